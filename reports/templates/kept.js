"use strict";

/** A figure without the trials that the filter hides. What is drawn of several trials stands or falls with all of them,
 * so that no median and no line counts one that is not there; a line of a heat map with any, since all are one network. */
const filtered = (figure, isShown) => {
  const kept = (trace) => {
    const meta = trace.meta ?? {};
    if (meta.all) return meta.all.every(isShown) ? { ...trace } : { ...trace, visible: false };
    if (meta.points) {
      const places = meta.points.flatMap((rows, place) => (rows.every(isShown) ? [place] : []));
      return places.length === meta.points.length ? { ...trace } : taken(trace, places);
    }
    if (meta.segments) {
      const places = meta.segments.flatMap((rows, place) =>
        rows.every(isShown) ? [3 * place, 3 * place + 1, 3 * place + 2] : []);
      return places.length === 3 * meta.segments.length ? { ...trace } : taken(trace, places);
    }
    // The others stay as empty lines, each in its place.
    if (meta.lines) {
      const only = (lines) => lines?.map((line, place) => (meta.lines[place].some(isShown) ? line : line.map(() => null)));
      return { ...trace, z: only(trace.z), text: only(trace.text), customdata: only(trace.customdata), ...scaleOf(trace) };
    }
    return { ...trace };
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

/** Of a heat map the ends of its colours, whatever of it is shown. */
const scaleOf = (trace) => {
  if (trace.showscale === false) return {};
  const numbers = trace.z.flat().filter((value) => value !== null);
  const zmin = Math.min(...numbers), zmax = Math.max(...numbers);
  return zmin < zmax ? { zmin, zmax } : {};
};

/** Where the axes of a drawn figure end and what is left free around them: with these a figure that has less to show is
 * drawn on the same axes in the same place, so that two pictures can be laid over each other. */
const frameOf = (plot) => {
  const layout = plot._fullLayout, { l, r, t, b } = layout._size;
  // Categories stay anyway, with the lines of a heat map.
  const names = Object.keys(layout).filter((name) =>
    /^[xy]axis\d*$/.test(name) && layout[name].autorange && layout[name].type !== "category");
  // Given as what autorange has to find, since it is asked again by a double click.
  const ends = names.map((name) => {
    const { range } = layout[name], [minallowed, maxallowed] = range;
    return [name, { range: [...range], autorange: true, autorangeoptions: { minallowed, maxallowed } }];
  });
  return { axes: Object.fromEntries(ends), margin: { l, r, t, b, autoexpand: false } };
};

/** What stands in a figure that has nothing left to draw, beside what it says of its panels. */
const said = (figure, data) => {
  const hasAny = (values) => values.some((value) => (Array.isArray(value) ? hasAny(value) : value !== null));
  const draws = (trace) => trace.visible !== false && (trace.meta || trace.stackgroup) && hasAny(trace.z ?? trace.x ?? []);
  if (data.some(draws)) return {};
  const text = { text: "The filter hides all trials that this figure draws.", showarrow: false, font: { size: 15 } };
  const note = { ...text, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
  // Without any data it is no trial's; its notes and shapes are of the one that was there.
  return data.length ? { annotations: [note, ...(figure.layout.annotations ?? [])] } : { annotations: [note], shapes: [] };
};
