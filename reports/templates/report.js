"use strict";

(async () => {
  // DataTables' own style knows a class where ours asks the system.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dress = () => document.documentElement.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", dress);
  dress();
  const { columns, figures, laws } = JSON.parse(await unpacked("data"));
  let filter = { isShown: () => true, isWhole: () => true };
  let table = null;
  const drawn = makeFigures(figures, () => filter, columns?.ids);
  if (columns !== null) {
    filter = makeFilter(columns, document.getElementById("choose"), async () => {
      table?.refresh();
      await drawn.refresh(filter.isWhole());
      document.documentElement.dataset.filtered = String(Number(document.documentElement.dataset.filtered ?? 0) + 1);
    });
  }
  await drawn.refresh(false);
  const lines = document.getElementById("laws");
  lines?.addEventListener("click", () => download(lines.dataset.name, laws));
  // Both announce the same print; one pass, and what it changed put back when it has ended.
  let printing = false, closed = [];
  const whole = () => {
    if (printing) return;
    printing = true;
    closed = [...document.querySelectorAll("main details:not([open], .facet)")];
    for (const details of closed) details.open = true;
    table?.showAll();
    drawn.drawAll();
    document.documentElement.dataset.whole = "true";
  };
  const back = () => {
    if (!printing) return;
    printing = false;
    for (const details of closed) details.open = false;
    table?.putBack();
    drawn.putBack();
    delete document.documentElement.dataset.whole;
  };
  window.addEventListener("beforeprint", whole);
  window.addEventListener("afterprint", back);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? whole() : back()));
  if (columns !== null) table = await makeTable(columns, () => filter);
  if (printing) table?.showAll();
  document.documentElement.dataset.ready = "true";
})();
