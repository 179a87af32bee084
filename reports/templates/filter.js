"use strict";

/** One filter for all figures and the table, kept in the address: which trials are shown, as a 0 or 1 for each. */
const makeFilter = (columns, root, changed) => {
  const count = columns.ids.length;
  const chosen = new Map(columns.facets.map((facet) => [facet.key, new Set()]));
  const search = root.querySelector("#filter");
  const shared = columns.same.join(" ");
  const texts = columns.ids.map((_, row) =>
    [columns.status.words[columns.status.codes[row]], columns.reasons.words[columns.reasons.codes[row]], shared,
      ...columns.spec.map((column) => column.words[column.codes[row]]),
      ...columns.facets.map((facet) => facet.words[facet.codes[row]] ?? "")].join(" ").toLowerCase());
  let unknown = [];
  let mask = new Uint8Array(count).fill(1);

  const look = () => {
    const words = wordsOf(search.value);
    const facets = columns.facets.filter((facet) => chosen.get(facet.key).size);
    let shown = 0;
    mask = new Uint8Array(count);
    for (let row = 0; row < count; row += 1) {
      const fits = facets.every((facet) => chosen.get(facet.key).has(facet.codes[row]))
        && words.every((word) => texts[row].includes(word) || columns.ids[row].startsWith(word));
      mask[row] = fits ? 1 : 0;
      shown += mask[row];
    }
    const gone = unknown.length ? `; not in this report: ${unknown.join(", ")}` : "";
    root.querySelector("#shown").textContent = `${shown} of ${count} trials${gone}`;
    for (const facet of columns.facets) {
      const own = chosen.get(facet.key);
      const which = own.size === 0 ? "all"
        : own.size === 1 ? facet.words[[...own][0]] : `${own.size} of ${facet.words.length}`;
      root.querySelector(`[data-facet="${facet.key}"] summary`).textContent = `${facet.label}: ${which}`;
    }
    root.querySelector("#reset").hidden = words.length === 0 && facets.length === 0;
    root.querySelector("#hint").hidden = shown === count;
  };
  const remember = () => {
    const address = new URLSearchParams();
    for (const facet of columns.facets) {
      for (const code of chosen.get(facet.key)) address.append(facet.key, facet.words[code]);
    }
    if (search.value) address.set("q", search.value);
    history.replaceState(null, "", String(address) ? `#${address}` : location.pathname + location.search);
  };
  const recall = () => {
    const address = new URLSearchParams(location.hash.slice(1));
    search.value = address.get("q") ?? "";
    unknown = [...address].filter(([key, word]) => key !== "q" && word
      && !columns.facets.some((facet) => facet.key === key && facet.words.includes(word))).map(([, word]) => word);
    for (const facet of columns.facets) {
      const codes = address.getAll(facet.key).map((word) => facet.words.indexOf(word)).filter((code) => code >= 0);
      chosen.set(facet.key, new Set(codes));
      root.querySelectorAll(`[data-facet="${facet.key}"] input`).forEach((box, code) => {
        box.checked = codes.includes(code);
      });
    }
  };
  const apply = () => {
    unknown = [];
    look();
    remember();
    changed();
  };

  for (const facet of columns.facets) {
    const details = document.createElement("details");
    details.className = "facet";
    details.dataset.facet = facet.key;
    const options = facet.words.map((word, code) =>
      `<label><input type="checkbox" value="${code}"> ${escaped(word)}</label>`);
    details.innerHTML = `<summary></summary><fieldset><legend>${escaped(facet.label)}</legend>${options.join("")}</fieldset>`;
    details.addEventListener("change", (event) => {
      const own = chosen.get(facet.key), code = Number(event.target.value);
      if (event.target.checked) own.add(code); else own.delete(code);
      apply();
    });
    details.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      details.open = false;
      details.querySelector("summary").focus();
    });
    root.querySelector("#facets").append(details);
  }
  document.addEventListener("click", (event) => {
    for (const details of root.querySelectorAll(".facet[open]")) {
      if (!details.contains(event.target)) details.open = false;
    }
  });
  search.addEventListener("input", apply);
  root.querySelector("#reset").addEventListener("click", () => {
    history.replaceState(null, "", location.pathname + location.search);
    recall();
    apply();
  });
  window.addEventListener("hashchange", () => {
    // A place in the page, and no filter.
    if (location.hash && !location.hash.includes("=")) return;
    recall();
    look();
    changed();
  });
  recall();
  look();
  return { isShown: (row) => mask[row] === 1, isWhole: () => !mask.includes(0) };
};
