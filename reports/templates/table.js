"use strict";

/** The table of all trials, out of the columns, by DataTables; what the filter hides is not in it. */
const makeTable = async (columns, filter) => {
  const source = new Blob([await unpacked("datatables")], { type: "text/javascript" });
  const address = URL.createObjectURL(source);
  const { jQuery } = await import(address);
  URL.revokeObjectURL(address);
  const element = document.getElementById("table");

  const word = (column) => (row) => column.words[column.codes[row]];
  const plain = (heading, of, more = false) => ({
    title: escaped(heading), data: null, type: "any", visible: !more, more,
    render: ({ row }, kind) => (kind === "display" ? escaped(of(row)) : of(row)),
  });
  const described = [
    { ...plain("id", (row) => columns.ids[row]), render: ({ row }, kind) =>
      (kind === "display" ? `<code>${columns.ids[row]}</code>` : columns.ids[row]) },
    plain("status", word(columns.status)),
    ...columns.spec.map((column) => {
      const own = plain(column.heading, word(column));
      const isNumeric = column.words.every((text) => text === "–" || !Number.isNaN(Number(text)));
      const value = (text) => (text === "–" ? null : isNumeric ? Number(text) : text);
      own.render = ({ row }, kind) => (kind === "display" ? escaped : value)(word(column)(row));
      return own;
    }),
    ...columns.metrics.map((column) => ({
      title: escaped(column.heading), data: null, type: "any", className: "number", visible: !column.more, more: column.more,
      render: ({ row }, kind) => {
        if (kind !== "display") return column.values[row] === null ? null : Number(column.values[row]);
        const why = column.whys.words[column.whys.codes[row]];
        const text = escaped(column.texts.words[column.texts.codes[row]]);
        return why ? `<span class="why" title="${escaped(why)}">${text}</span>` : text;
      },
    })),
    { ...plain("attempts", (row) => columns.attempts[row]), className: "number" },
    plain("reason", word(columns.reasons), true),
  ];
  Object.assign(jQuery.fn.dataTable.ext.type.order, { "any-asc": inOrder(true), "any-desc": inOrder(false) });
  jQuery.fn.dataTable.ext.search.push((settings, texts, place) => filter().isShown(place));
  const table = jQuery(element).DataTable({
    data: columns.ids.map((_, row) => ({ row })),
    columns: described,
    order: [],
    pageLength: 25,
    lengthMenu: [25, 100, 1000, { label: "all", value: -1 }],
    deferRender: true,
    autoWidth: false,
    orderClasses: false,
    layout: { topStart: null, topEnd: null, bottomStart: ["pageLength", "info"], bottomEnd: "paging" },
    language: { lengthMenu: "_MENU_ trials a page", info: "_START_ to _END_ of _TOTAL_", infoEmpty: "none", infoFiltered: "",
      emptyTable: "No trial has a record yet.", zeroRecords: "The filter hides all trials." },
    createdRow: (tr, { row }) => {
      tr.classList.add(`status-${columns.status.words[columns.status.codes[row]].split(" ").pop()}`);
    },
  });
  const more = document.getElementById("more");
  more.addEventListener("change", () => {
    described.forEach((column, place) => column.more && table.column(place).visible(more.checked, false));
    table.columns.adjust().draw(false);
  });
  document.querySelector("#trials .csv").addEventListener("click", () => {
    const shown = columns.ids.map((_, row) => row).filter((row) => filter().isShown(row));
    const { spec, metrics } = columns.shared;
    const heads = ["id", "status", ...[...columns.spec, ...spec].map((column) => column.heading),
      ...[...columns.metrics, ...metrics].map((column) => column.name), "attempts", "reason"];
    const rows = shown.map((row) => [columns.ids[row], word(columns.status)(row).split(" ").pop(),
      ...columns.spec.map((column) => word(column)(row)), ...spec.map((column) => column.text),
      ...columns.metrics.map((column) => column.values[row]), ...metrics.map((column) => column.value),
      columns.attempts[row], word(columns.reasons)(row)]);
    download("trials.csv", csvOf([heads, ...rows]));
  });
  let length = 25;
  return {
    refresh: () => table.draw(),
    showAll: () => {
      length = table.page.len();
      table.page.len(-1).draw();
    },
    putBack: () => table.page.len(length).draw(),
  };
};
