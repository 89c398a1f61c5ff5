// Elements, numbers and colours. Text enters the page by textContent alone: nothing in it can be markup.

const NAMES = { rest: "rest", bias: "bias" };
const views = {}; // kind -> (view, sheet, page) => element; scripts view_*.js register theirs

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// quoted texts that are written from right to left are isolated, so that what stands around them stays in order
const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/;
const isolated = (text) => (RTL.test(text) ? text.replace(/(['"])((?:(?!\1).)*)\1/gs, "$1\u2068$2\u2069$1") : text);
const bdi = (text) => h("bdi", { dir: /['"]/.test(text) ? "ltr" : null }, visible(text));

// line breaks and other characters that nobody sees are shown by signs
const escaped = (text) => [...text].map((c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`).join("");
function visible(text) {
  if (/^ +$/.test(text)) return text.replace(/ /g, "␣");
  if (/^[\p{M}\p{Cf}]+$/u.test(text))
    return /^[\p{Mn}\p{Mc}\p{Me}]+$/u.test(text) && !/[\ufe00-\ufe0f]/.test(text) ? `◌${text}` : escaped(text);
  const shown = text
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f\u2028\u2029\u200b]/g, escaped);
  return isolated(shown) || "∅";
}

const quoted = (text) => `'${visible(text)}'`;
const tokenText = (sheet, n) => visible(sheet.shown[n] ?? sheet.tokens[n] ?? "");
const tokenName = (sheet, n) => quoted(sheet.shown[n] ?? sheet.tokens[n] ?? "");

// what a graph's node is called: a token as it is shown, others by their ids
function nodeName(sheet, id) {
  const position = /^['"][^]*@(\d+)$/.exec(id)?.[1];
  return position === undefined ? id : `${tokenName(sheet, position)}@${position}`;
}

const decimalsOf = (unit) => Math.max(0, Math.round(-Math.log10(unit)));

// a signed number with the decimals that the largest one needs for four digits, as far as the unit has them
function formatter(largest, unit, unsigned = false) {
  const size = Math.abs(largest) * unit;
  const wanted = size > 0 ? 3 - Math.floor(Math.log10(size)) : 3,
    decimals = Math.max(0, Math.min(9, decimalsOf(unit), wanted));
  return (units) => {
    const text = (Math.abs(units) * unit).toFixed(decimals);
    const sign = units > 0 ? (unsigned ? "" : "+") : units < 0 ? "−" : "";
    return (/[1-9]/.test(text) ? sign : "") + text;
  };
}

const sizeOf = (numbers) => numbers.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
const sumOf = (numbers) => numbers.reduce((sum, x) => sum + x, 0);
const plainly = (units, unit) => (units * unit).toFixed(decimalsOf(unit)); // as files have it
const exactly = (units, unit) => plainly(units, unit).replace("-", "−");

// counts, in one way of writing: 1 token, 2,041 tokens
const written = (count) => count.toLocaleString("en");
const counted = (count, one, many = `${one}s`) => `${written(count)} ${count === 1 ? one : many}`;

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// the colour of a share: its strength grows with the root of its size, as the legends show it
function shade(units, largest, of = null) {
  const name = of || (units > 0 ? "positive" : "negative");
  if (!units || !largest) return "transparent";
  const strength = (isDark() ? 0.52 : 0.66) * Math.sqrt(Math.min(1, Math.abs(units) / largest));
  return `rgba(${colour(`${name}-rgb`)}, ${strength.toFixed(3)})`;
}

function download(name, content, type) {
  const url =
    content instanceof Blob || (typeof content === "string" && !content.startsWith("data:"))
      ? URL.createObjectURL(new Blob([content], { type }))
      : content;
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  if (url !== content) setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function csvOf(names, rows) {
  const cell = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
  return [names, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

const layerOf = (label) => {
  const found = /^L(\d+)/.exec(label);
  return found ? Number(found[1]) : null;
};

// the arrow keys of a row of elements of which one at a time can be reached by Tab; Escape calls `undo`
function roving(container, items, along, undo) {
  items.forEach((item, i) => item.setAttribute("tabindex", i === 0 ? "0" : "-1"));
  let reached = items[0];
  const focus = (i) => {
    reached.setAttribute("tabindex", "-1");
    reached = items[Math.max(0, Math.min(items.length - 1, i))];
    reached.setAttribute("tabindex", "0");
    reached.focus();
  };
  container.addEventListener("keydown", (event) => {
    const at = items.indexOf(event.target.closest("[tabindex]"));
    if (at < 0) return;
    const rtl = getComputedStyle(container).direction === "rtl" ? -1 : 1;
    const step = { ArrowRight: rtl, ArrowLeft: -rtl, ArrowDown: along, ArrowUp: -along }[event.key];
    if (step) focus(at + step);
    else if (event.key === "Home") focus(0);
    else if (event.key === "End") focus(items.length - 1);
    else if (event.key === "Escape") undo();
    else return;
    event.preventDefault();
  });
}
