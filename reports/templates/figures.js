"use strict";

/** After what has been drawn is seen. */
const whenIdle = window.requestIdleCallback?.bind(window) ?? ((task) => setTimeout(task, 50));

/** A trace without what only its table shows: Plotly looks through all that it is given. */
const drawn = (trace) => (trace.meta?.more ? { ...trace, meta: { ...trace.meta, more: null } } : trace);

/** What a figure shows, as rows: which series, which panel, and its numbers. */
const rowsOf = (figure, data, ids) => {
  const title = (axis, letter) => {
    const own = figure.layout[letter + "axis" + (axis ?? letter).slice(1)]?.title?.text;
    return own ?? figure.layout[letter + "axis"]?.title?.text ?? letter;
  };
  const panels = !figure.layout.xaxis2 ? [] : (figure.layout.annotations ?? []).map((note) => note.text.replaceAll("<br>", " "));
  const panelOf = (trace) => panels[Number((trace.xaxis ?? "x").slice(1) || 1) - 1] ?? "";
  const listed = data.filter((trace) => trace.visible !== false && trace.hoverinfo !== "skip"
    && (trace.z || trace.x?.some((value) => value !== null)));
  const heads = new Set(), rows = [];
  const more = [...new Set(listed.flatMap((trace) => Object.keys(trace.meta?.more ?? {})))];
  for (const trace of listed) {
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
const SCREEN = { autosize: true }, PAPER = { autosize: false, width: 670 };
// Double click and the house do what these do; the fewer, the less of a title they hide.
const LEFT_OUT = ["zoomIn2d", "zoomOut2d", "autoScale2d", "lasso2d", "select2d"];

/** Draws a view when it comes into sight, and anew when the filter changed since. */
const makeFigures = (figures, filter, ids) => {
  const views = [...document.querySelectorAll(".view[data-anchor]")].filter((view) => figures[view.dataset.anchor]);
  const states = new Map(), kept = new Map(), frames = {};
  // A zoom stays while the filter changes, until all is shown again.
  let generation = 0, wholes = 0, size = SCREEN;

  const draw = async (view) => {
    const state = states.get(view);
    const anchor = view.dataset.anchor, figure = figures[anchor];
    const place = `${anchor} ${size.width ?? state.plot.clientWidth}`;
    if (view.hidden || (state.drawn === generation && state.place === place)) return;
    Object.assign(state, { drawn: generation, place });
    state.data = view.dataset.empty ? [] : filtered(figure, filter().isShown);
    view.querySelector(".figure").setAttribute("aria-label", figure.layout.meta.description);
    const many = state.data.some((trace) => trace.type === "scattergl");
    const show = (data) => {
      // Plotly writes into a layout what its reader does, and the figure is to stay as it was.
      const layout = { ...structuredClone(figure.layout), ...besides(view, figures), ...said(figure, data), ...size };
      const frame = frames[place];
      for (const [axis, ends] of Object.entries(frame?.axes ?? {})) layout[axis] = { ...layout[axis], ...structuredClone(ends) };
      layout.margin = { ...layout.margin, ...frame?.margin };
      layout.uirevision = `${anchor} ${wholes}`;
      return Plotly.react(state.plot, data.map(drawn), layout, {
        responsive: true, displaylogo: false, plotGlPixelRatio: many ? 1 : 2, modeBarButtonsToRemove: LEFT_OUT,
        toImageButtonOptions: { format: "svg", filename: anchor },
      });
    };
    let done = null;
    if (!frames[place]) {
      done = show(figure.data.map((trace) => ({ ...trace })));
      frames[place] = frameOf(state.plot);
    }
    if (!done || !filter().isWhole()) done = show(state.data);
    await done;
    view.dataset.drawn = String(generation);
    if (state.table.parentElement.open) list(view);
  };
  const list = (view) => {
    const state = states.get(view);
    const { heads, rows } = rowsOf(figures[view.dataset.anchor], state.data ?? figures[view.dataset.anchor].data);
    const shown = (value) => (typeof value === "number" ? Number(value.toPrecision(6)) : escaped(value ?? ""));
    const left = rows.length - LISTED;
    const note = left > 0 ? `<caption>The first ${LISTED} of ${rows.length} rows; the CSV has all.</caption>` : "";
    state.table.classList.toggle("wide", heads.length > 6);
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

  window.addEventListener("resize", () => views.forEach((view) => states.get(view).near && draw(view)));
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
    refresh: (isWhole) => {
      generation += 1;
      wholes += isWhole ? 1 : 0;
      repick();
      // What is in sight at once, by a third at least; what is near it, after that.
      const near = views.filter((view) => states.get(view).near);
      const isSeen = (view) => {
        const { top, bottom, height } = states.get(view).plot.getBoundingClientRect();
        return 3 * (Math.min(bottom, innerHeight) - Math.max(top, 0)) > height;
      };
      return Promise.all(near.filter(isSeen).map(draw)).then(() => {
        whenIdle(() => near.forEach(draw));
      });
    },
    /** For print, all of it, whatever is in sight: drawn when this returns, for a browser may wait for nothing. */
    drawAll: () => {
      size = PAPER;
      for (const view of views) {
        kept.set(view, view.hidden);
        view.hidden = false;
        draw(view);
        list(view);
      }
    },
    putBack: () => {
      size = SCREEN;
      for (const [view, hidden] of kept) {
        view.hidden = hidden;
        // The others when they come into sight.
        if (states.get(view).near) draw(view);
      }
      kept.clear();
    },
  };
};
