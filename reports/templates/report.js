"use strict";

(async () => {
  // DataTables' own style knows a class where ours asks the system.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dress = () => document.documentElement.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", dress);
  dress();
  const { columns, figures } = JSON.parse(await unpacked("data"));
  let filter = { isShown: () => true };
  let table = null;
  const drawn = makeFigures(figures, () => filter, columns?.ids);
  if (columns !== null) {
    filter = makeFilter(columns, document.getElementById("choose"), async () => {
      table?.refresh();
      await drawn.refresh();
      document.documentElement.dataset.filtered = String(Number(document.documentElement.dataset.filtered ?? 0) + 1);
    });
  }
  await drawn.refresh();
  if (columns !== null) table = await makeTable(columns, () => filter);
  // Both announce the same print; one pass, and what it changed put back when it has ended.
  let printing = null;
  const whole = () => {
    printing ??= (async () => {
      table?.showAll();
      await drawn.drawAll();
      document.documentElement.dataset.whole = "true";
    })();
  };
  const back = async () => {
    const pass = printing;
    await pass;
    if (pass === null || printing !== pass) return;
    printing = null;
    table?.putBack();
    drawn.putBack();
    delete document.documentElement.dataset.whole;
  };
  window.addEventListener("beforeprint", whole);
  window.addEventListener("afterprint", back);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? whole() : back()));
  document.documentElement.dataset.ready = "true";
})();
