"use strict";
(() => {
  const figure = document.getElementById("figure-changes");
  if (figure) {
    const narrow = window.matchMedia("(max-width: 800px)");
    // Beside each other where there is room, else one below the other.
    const place = (paper) => {
      const placed = figure.layout.meta[paper ? "paper" : narrow.matches ? "narrow" : "wide"];
      figure.parentElement.style.height = `${placed.height}px`;
      Plotly.relayout(figure, { ...placed, ...(paper ? { autosize: false, width: 690 } : { autosize: true, width: null }) });
    };
    narrow.addEventListener("change", () => place(false));
    window.addEventListener("beforeprint", () => place(true));
    window.addEventListener("afterprint", () => place(false));
    if (narrow.matches) place(false);
  }

  document.documentElement.dataset.ready = "true";
  const table = document.getElementById("table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];

  const notFinite = { inf: Infinity, "-inf": -Infinity };
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    const number = notFinite[text] ?? Number(text);
    return text === "" ? null : Number.isNaN(number) && text !== "nan" ? text : number;
  };
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const keyed = rows.map((row) => [key(row, column), row]);
      const order = inOrder(ascending);
      keyed.sort(([a], [b]) => order(a, b));
      body.append(...keyed.map(([, row]) => row));
    });
  });

  const verdict = document.getElementById("verdict");
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const apply = () => {
    const words = wordsOf(filter.value);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (verdict.value !== "" && row.dataset.verdict !== verdict.value) || !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} pairs`;
  };
  verdict.addEventListener("change", apply);
  filter.addEventListener("input", apply);
  apply();
})();
