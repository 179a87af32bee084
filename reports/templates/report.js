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
  const drawn = makeFigures(figures, () => filter);
  if (columns !== null) {
    filter = makeFilter(columns, document.getElementById("choose"), async () => {
      table?.refresh();
      await drawn.refresh();
      document.documentElement.dataset.filtered = String(Number(document.documentElement.dataset.filtered ?? 0) + 1);
    });
  }
  await drawn.refresh();
  if (columns !== null) table = await makeTable(columns, () => filter);
  const whole = async () => {
    table?.showAll();
    await drawn.drawAll();
    document.documentElement.dataset.whole = "true";
  };
  window.addEventListener("beforeprint", whole);
  window.addEventListener("afterprint", () => {
    table?.putBack();
    drawn.putBack();
    delete document.documentElement.dataset.whole;
  });
  matchMedia("print").addEventListener("change", (event) => event.matches && whole());
  document.documentElement.dataset.ready = "true";
})();
