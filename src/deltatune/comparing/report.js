"use strict";
const root = document.documentElement;

// Light, dark, or as the system has it.
const themes = document.querySelectorAll(".theme button");
const remember = theme => { try { localStorage.setItem("deltatune-theme", theme); } catch { /* not from a file, perhaps */ } };
const recall = () => { try { return localStorage.getItem("deltatune-theme"); } catch { return null; } };
function show(theme) {
  root.style.colorScheme = theme === "auto" ? "" : theme;
  for (const button of themes) button.setAttribute("aria-pressed", button.value === theme);
}
for (const button of themes) button.addEventListener("click", () => { show(button.value); remember(button.value); });
show(["light", "dark"].includes(recall()) ? recall() : "auto");

// The table: sorted by its headings, filtered by words and verdict, with groups of columns shown or hidden.
const table = document.getElementById("methods");
const status = document.querySelector(".filters output");
function sort(button) {
  const head = button.closest("th"), body = table.tBodies[0];
  const order = head.ariaSort === "descending" ? "ascending" : "descending";
  const sign = order === "ascending" ? 1 : -1;
  const value = row => row.cells[head.cellIndex]?.dataset.value || null;
  const compare = button.value === "words"
    ? (a, b) => -sign * value(a).localeCompare(value(b))
    : (a, b) => (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  body.append(...[...body.rows].sort(compare));
}
function filter(form) {
  const words = form.words.value.trim().toLowerCase(), verdict = form.verdict.value;
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    row.hidden = !row.cells[0].dataset.value.toLowerCase().includes(words) || verdict !== "" && row.dataset.verdict !== verdict;
  }
  const hidden = new Set([...form.querySelectorAll("input[name=group]:not(:checked)")].map(box => box.value));
  for (const cell of table.querySelectorAll("[data-group]")) cell.hidden = hidden.has(cell.dataset.group);
  const shown = rows.filter(row => !row.hidden).length;
  status.value = shown === rows.length ? `${shown} methods` : `${shown} of ${rows.length} methods`;
}
if (table) {
  for (const button of table.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
  const form = document.querySelector(".filters");
  form.addEventListener("input", () => filter(form));
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => filter(form)));
  filter(form);
}

// Every run's settings, all at once or one by one; who comes from the table finds those of the method open.
for (const link of document.querySelectorAll("#methods tbody a")) link.addEventListener("click", () => {
  for (const run of document.querySelectorAll(`${link.hash} details`)) run.open = true;
});
const runs = document.querySelectorAll(".runs details");
document.querySelector(".unfold")?.addEventListener("click", event => {
  const open = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", open);
  for (const run of runs) run.open = open;
});
document.querySelector(".copy")?.addEventListener("click", async event => {
  const file = document.getElementById("experiment");
  getSelection().selectAllChildren(file);
  try { await navigator.clipboard.writeText(file.textContent); } catch { return; /* what is selected can be copied by hand */ }
  event.target.textContent = "Copied";
});
addEventListener("beforeprint", () => runs.forEach(run => run.open = false));
