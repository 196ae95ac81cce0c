"use strict";
const root = document.documentElement, one = (query, from = document) => from.querySelector(query);

// Theme: as the system says, until somebody chooses.
const theme = one("#theme"), dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
const label = () => { theme.textContent = isDark() ? "light" : "dark"; };
theme.hidden = false;
theme.ariaLabel = "Switch between light and dark";
label();
dark.addEventListener("change", label);
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });

// Charts: point at them, or focus one and use the arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const hits = [...plot.querySelectorAll(".hit")], rows = +plot.dataset.rows;
  const readout = one(".readout", plot.parentElement);
  let at = -1;
  const show = (index) => {
    if (hits[at]) hits[at].classList.remove("on");
    at = index;
    if (hits[at]) hits[at].classList.add("on");
    readout.textContent = hits[at] ? hits[at].textContent : "";
  };
  plot.addEventListener("pointermove", (event) => {
    const index = hits.indexOf(event.target);
    if (index >= 0 && index !== at) show(index);
  });
  plot.addEventListener("pointerleave", () => show(-1));
  plot.addEventListener("blur", () => show(-1));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: rows, ArrowLeft: -rows, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || (rows === 1 && Math.abs(step) === 1 && !event.key.match(/Right|Left/))) return;
    event.preventDefault();
    const next = at < 0 ? 0 : at + step;
    if (next >= 0 && next < hits.length) show(next);
  });
}

// Filters.
const filters = one("#filters"), cards = one("#cards");
if (filters) {
  const all = [...cards.querySelectorAll(".card")];
  const apply = () => {
    const { stage, kind, by } = filters.elements;
    let shown = 0;
    for (const card of all) {
      const fits = (!stage.value || card.dataset.stage === stage.value) &&
        (!kind.value || card.dataset.kinds.split(" ").includes(kind.value));
      card.hidden = !fits;
      shown += fits;
    }
    if (by) cards.dataset.by = by.value;
    one("#none").hidden = shown > 0;
    one("output", filters).textContent = `${shown} of ${all.length} shown`;
  };
  filters.hidden = false;
  filters.addEventListener("change", apply);
  apply();
}

// Tokens: each response is one stop of the Tab key, the arrow keys move inside it.
const tip = one("#tip"), names = ["student, as drawn", "teacher", "student, in the end"];
const place = (token) => {
  const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.min(box.left, root.clientWidth - size.width - 8);
  const above = box.top - size.height - 6;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
};
const tell = (token) => {
  const values = token.dataset.v.split(" ");
  const lines = values.map((v, i) => v && `${names[i]}: ${v} (${(100 * Math.exp(v)).toPrecision(3)}%)`);
  const drawn = values[0] || values[2];
  if (values[1] && drawn) lines.push(`teacher − student: ${(values[1] - drawn).toFixed(3)} nats`);
  tip.textContent = lines.filter(Boolean).join("\n").replaceAll("-", "−") || "no log-probability";
  tip.hidden = false;
  place(token);
};
const token = (event) => event.target.closest ? event.target.closest("i[data-v]") : null;
const hide = () => { tip.hidden = true; };
const focused = () => document.activeElement.matches("i[data-v]") ? document.activeElement : null;
const point = (event) => { const it = token(event) || focused(); if (it) tell(it); else hide(); };
if (cards) {
  for (const first of cards.querySelectorAll(".tokens i:first-child")) first.tabIndex = 0;
  for (const kind of ["pointerover", "pointerleave", "focusin"]) cards.addEventListener(kind, point);
  cards.addEventListener("focusout", hide);
  cards.addEventListener("click", (event) => { const it = token(event); if (it) { it.tabIndex = 0; it.focus(); } });
  cards.addEventListener("keydown", (event) => {
    const it = token(event);
    if (!it) return;
    if (event.key === "Escape") hide();
    const next = event.key === "ArrowRight" ? it.nextElementSibling : event.key === "ArrowLeft" ? it.previousElementSibling : null;
    if (!next || !next.dataset.v) return;
    event.preventDefault();
    it.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
