"use strict";

/** What is looked for in a text: it has to have each of the words. */
const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

const letters = new Intl.Collator("en", { numeric: true });

/** How two values of a column stand, numbers by size and words by letter. Whichever way it is sorted, what is not finite
 * comes after that, and what there is not (null) last. */
const inOrder = (ascending) => (a, b) => {
  const rank = (value) => (value === null ? 2 : typeof value === "number" && !Number.isFinite(value) ? 1 : 0);
  if (rank(a) || rank(b)) return rank(a) - rank(b) || letters.compare(a, b);
  const order = typeof a === "number" && typeof b === "number" ? a - b : letters.compare(a, b);
  return ascending ? order : -order;
};
