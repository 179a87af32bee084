"use strict";

/** A figure without the trials that the filter hides. What is drawn of several trials stands or falls with all of them,
 * so that no median and no line counts one that is not there; a line of a heat map with any, since all are one network. */
const filtered = (figure, isShown) => {
  const kept = (trace) => {
    const meta = trace.meta ?? {};
    if (meta.all) return meta.all.every(isShown) ? trace : { ...trace, visible: false };
    if (meta.points) {
      const places = meta.points.flatMap((rows, place) => (rows.every(isShown) ? [place] : []));
      return places.length === meta.points.length ? trace : taken(trace, places);
    }
    if (meta.segments) {
      const places = meta.segments.flatMap((rows, place) =>
        rows.every(isShown) ? [3 * place, 3 * place + 1, 3 * place + 2] : []);
      return places.length === 3 * meta.segments.length ? trace : taken(trace, places);
    }
    if (meta.lines) {
      const places = meta.lines.flatMap((rows, place) => (rows.some(isShown) ? [place] : []));
      const pick = (values) => values && places.map((place) => values[place]);
      return { ...trace, y: pick(trace.y), z: pick(trace.z), text: pick(trace.text),
        customdata: pick(trace.customdata), visible: places.length > 0 };
    }
    return trace;
  };
  return withLegend(figure.data, figure.data.map(kept));
};

/** Of the traces of one name the first that shows anything stands for them in the legend. */
const withLegend = (before, now) => {
  const entry = (trace) => `${trace.legendgroup}|${trace.name}`;
  const inLegend = before.filter((trace) => trace.name && trace.showlegend !== false);
  const wanted = new Set(inLegend.map(entry));
  // An entry that draws nothing stands for all of its name, whatever they look like.
  for (const key of inLegend.filter((trace) => !trace.meta)) wanted.delete(entry(key));
  const moved = new Set(wanted);
  const isEmpty = (trace) => trace.visible === false || (trace.meta?.points && trace.x.length === 0);
  return now.map((trace) => {
    if (!trace.name || !trace.legendgroup || !moved.has(entry(trace)) || isEmpty(trace)) return trace;
    return { ...trace, showlegend: wanted.delete(entry(trace)) };
  });
};

const taken = (trace, places) => {
  const pick = (values) => (Array.isArray(values) ? places.map((place) => values[place]) : values);
  const own = { ...trace, meta: { ...trace.meta } };
  if (trace.meta.points) own.meta.points = pick(trace.meta.points);
  if (trace.meta.more) own.meta.more = Object.fromEntries(Object.entries(trace.meta.more).map(([head, values]) => [head, pick(values)]));
  for (const name of ["x", "y", "text", "customdata"]) own[name] = pick(trace[name]);
  if (trace.error_y) {
    own.error_y = { ...trace.error_y, array: pick(trace.error_y.array), arrayminus: pick(trace.error_y.arrayminus) };
  }
  if (Array.isArray(trace.marker?.size)) own.marker = { ...trace.marker, size: pick(trace.marker.size) };
  return own;
};

/** What a figure shows, as rows: which series, which panel, and its numbers. */
const rowsOf = (figure, data, ids) => {
  const title = (axis, letter) => {
    const own = figure.layout[letter + "axis" + (axis ?? letter).slice(1)]?.title?.text;
    return own ?? figure.layout[letter + "axis"]?.title?.text ?? letter;
  };
  const panels = !figure.layout.xaxis2 ? [] : (figure.layout.annotations ?? []).map((note) => note.text.replaceAll("<br>", " "));
  const panelOf = (trace) => panels[Number((trace.xaxis ?? "x").slice(1) || 1) - 1] ?? "";
  const drawn = data.filter((trace) => trace.visible !== false && trace.hoverinfo !== "skip"
    && (trace.z || trace.x?.some((value) => value !== null)));
  const heads = new Set(), rows = [];
  const more = [...new Set(drawn.flatMap((trace) => Object.keys(trace.meta?.more ?? {})))];
  for (const trace of drawn) {
    if (trace.z) {
      if (!trace.customdata) continue;
      heads.add(`${title(trace.yaxis, "y")}|${title(trace.xaxis, "x")}|relative error`);
      trace.y.forEach((name, line) => trace.x.forEach((column, place) => {
        const value = trace.customdata[line][place];
        if (value !== null) rows.push([name, column, value]);
      }));
      continue;
    }
    heads.add(`series|panel|${title(trace.xaxis, "x")}|${title(trace.yaxis, "y")}`);
    trace.x.forEach((x, place) => {
      if (x !== null && trace.y[place] !== null) {
        const name = trace.name ?? trace.legendgroup ?? "";
        const kind = { fitted: ", fitted line", predicted: ", predicted" }[trace.meta?.kind] ?? "";
        const row = [name + kind, panelOf(trace), x, trace.customdata?.[place] ?? trace.y[place]];
        row.push(...more.map((head) => trace.meta?.more?.[head]?.[place] ?? ""));
        if (ids) row.push((trace.meta?.points?.[place] ?? []).map((each) => ids[each]).join(" "));
        rows.push(row);
      }
    });
  }
  const found = ([...heads][0] ?? "nothing is shown").split("|");
  if (found[0] === "series") found.push(...more, ...(ids ? ["trials"] : []));
  return { heads: found, rows };
};

/** What stands in a figure that has nothing left to draw. */
const said = (data) => {
  const draws = (trace) => trace.visible !== false && (trace.meta || trace.stackgroup) && (trace.z ?? trace.x ?? []).length;
  if (data.some(draws)) return {};
  const text = { text: "The filter hides all trials that this figure draws.", showarrow: false, font: { size: 15 } };
  return { annotations: [{ ...text, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }], shapes: [] };
};

/** Of two figures side by side the scale that has room for both. */
const besides = (view, figures) => {
  const pair = view.closest(".beside")?.querySelectorAll(".view");
  if (!pair) return {};
  const tops = [...pair].map((each) => figures[each.dataset.anchor].layout.yaxis.range[1]);
  const own = figures[view.dataset.anchor].layout;
  return { yaxis: { ...own.yaxis, range: [0, Math.max(...tops)] } };
};

// Of more rows nobody reads on; and on paper they would be a book.
const LISTED = 300;
const PAPER_PX = 700;

/** Draws a view when it comes into sight, and anew when the filter changed since. */
const makeFigures = (figures, filter, ids) => {
  const views = [...document.querySelectorAll(".view[data-anchor]")].filter((view) => figures[view.dataset.anchor]);
  const states = new Map(), kept = new Map();
  let generation = 0;

  const draw = async (view) => {
    const state = states.get(view);
    if (view.hidden || state.drawn === generation) return;
    state.drawn = generation;
    const figure = figures[view.dataset.anchor];
    state.data = view.dataset.empty ? [] : filtered(figure, filter().isShown);
    view.querySelector(".figure").setAttribute("aria-label", figure.layout.meta.description);
    const many = state.data.some((trace) => trace.type === "scattergl");
    await Plotly.react(state.plot, state.data, { ...figure.layout, ...besides(view, figures), ...said(state.data) }, {
      responsive: true, displaylogo: false, plotGlPixelRatio: many ? 1 : 2,
      toImageButtonOptions: { format: "svg", filename: view.dataset.anchor },
    });
    view.dataset.drawn = String(generation);
    if (state.table.parentElement.open) list(view);
  };
  const list = (view) => {
    const state = states.get(view);
    const { heads, rows } = rowsOf(figures[view.dataset.anchor], state.data ?? figures[view.dataset.anchor].data);
    const shown = (value) => (typeof value === "number" ? Number(value.toPrecision(6)) : escaped(value ?? ""));
    const left = rows.length - LISTED;
    const note = left > 0 ? `<caption>The first ${LISTED} of ${rows.length} rows; the CSV has all.</caption>` : "";
    state.table.innerHTML = `${note}<thead><tr>${heads.map((head) => `<th scope="col">${escaped(head)}</th>`).join("")}</tr></thead>`
      + `<tbody>${rows.slice(0, LISTED).map((row) => `<tr>${row.map((value) =>
        `<td${typeof value === "number" ? ' class="number"' : ""}>${shown(value)}</td>`).join("")}</tr>`).join("")}</tbody>`;
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      states.get(entry.target).near = entry.isIntersecting;
      if (entry.isIntersecting) draw(entry.target);
    }
  }, { rootMargin: "300px" });

  for (const view of views) {
    states.set(view, { plot: view.querySelector(".plot"), table: view.querySelector("table"), drawn: -1, near: false });
    view.querySelector(".behind").addEventListener("toggle", (event) => event.target.open && list(view));
    view.querySelector(".csv").addEventListener("click", () => {
      const { heads, rows } = rowsOf(figures[view.dataset.anchor], states.get(view).data ?? figures[view.dataset.anchor].data, ids);
      download(`${view.dataset.anchor}.csv`, csvOf([heads, ...rows]));
    });
    view.querySelector(".svg").addEventListener("click", async () => {
      await draw(view);
      Plotly.downloadImage(states.get(view).plot, { format: "svg", filename: view.dataset.anchor, width: 1100,
        height: figures[view.dataset.anchor].layout.height });
    });
    watcher.observe(view);
  }
  /** Another trial in a view of two: both are drawn anew, since they share a scale. */
  const picks = [...document.querySelectorAll(".pick select")];
  const show = (select, anchor) => {
    const view = select.closest(".view");
    if (anchor) {
      select.value = anchor;
      view.dataset.anchor = anchor;
      delete view.dataset.empty;
    } else view.dataset.empty = "yes";
    states.get(view).drawn = -1;
    for (const [kind, name] of [[".csv", "CSV"], [".svg", "SVG"]]) {
      view.querySelector(kind).setAttribute("aria-label", `${name} of ${select.selectedOptions[0]?.textContent ?? "no trial"}`);
    }
  };
  for (const select of picks) {
    select.dataset.wish = select.value;
    select.addEventListener("change", () => {
      select.dataset.wish = select.value;
      for (const each of picks) show(each, each.value);
      for (const view of select.closest(".beside").querySelectorAll(".view")) if (states.get(view).near) draw(view);
    });
  }
  /** What the reader chose where the filter shows it, else another than the one beside it. */
  const repick = () => {
    const taken = [];
    for (const select of picks) {
      for (const option of select.options) option.disabled = !filter().isShown(Number(option.dataset.row));
      const free = [...select.options].filter((option) => !option.disabled && !taken.includes(option.value));
      const wished = free.find((option) => option.value === select.dataset.wish);
      const wishes = picks.map((each) => each.dataset.wish);
      const chosen = wished ?? free.find((option) => !wishes.includes(option.value)) ?? free[0];
      if (chosen) taken.push(chosen.value);
      show(select, chosen?.value);
    }
  };
  for (const choice of document.querySelectorAll(".views input")) {
    choice.addEventListener("change", () => {
      for (const view of choice.closest("section").querySelectorAll(".view")) {
        view.hidden = view.dataset.anchor !== choice.value;
        if (!view.hidden && states.has(view)) draw(view);
      }
    });
  }
  return {
    refresh: () => {
      generation += 1;
      repick();
      // What is in sight at once, by a third at least; what is near it, after that.
      const near = views.filter((view) => states.get(view).near);
      const isSeen = (view) => {
        const { top, bottom, height } = states.get(view).plot.getBoundingClientRect();
        return 3 * (Math.min(bottom, innerHeight) - Math.max(top, 0)) > height;
      };
      return Promise.all(near.filter(isSeen).map(draw)).then(() => {
        setTimeout(() => near.forEach(draw), 0);
      });
    },
    /** For print: all of it, whatever is in sight. */
    drawAll: async () => {
      for (const view of views) {
        kept.set(view, { hidden: view.hidden, open: view.querySelector(".behind").open });
        view.hidden = false;
        view.querySelector(".behind").open = true;
      }
      for (const view of views) {
        await draw(view);
        await Plotly.relayout(states.get(view).plot, { autosize: false, width: PAPER_PX });
        list(view);
      }
    },
    putBack: () => {
      for (const [view, { hidden, open }] of kept) {
        view.hidden = hidden;
        view.querySelector(".behind").open = open;
        Plotly.relayout(states.get(view).plot, { autosize: true, width: null });
      }
      kept.clear();
    },
  };
};
