// A table of shares that is sorted by its head's buttons, with bars, its sum in its foot, CSV and pictures.

const signedPart = (text, units, format) =>
  h("span", { class: "part" }, h("span", { class: "muted" }, text), " ", format(units));

// the parts of a group and its sum beside the model's own number, in words
function sumLine(parts, total, sheet, { value = null, name = "sum", unsigned = false } = {}) {
  const format = formatter(sizeOf([total, ...parts.map((part) => part.units)]), sheet.unit, unsigned);
  const shown = parts
    .filter((part) => part.always || (part.units !== 0 && isSeen(part, format)))
    .map((part) => signedPart(part.label, part.units, format));
  const line = h(
    "p",
    { class: "sum" },
    ...shown,
    h(
      "span",
      { class: "part total" },
      h("span", { class: "muted" }, `= ${name}`),
      " ",
      h("strong", { "data-sum": total }, exactly(total, sheet.unit)),
    ),
  );
  if (value !== null) {
    line.append(
      h(
        "span",
        { class: "part" },
        h("span", { class: "muted" }, sheet.what),
        " ",
        h("strong", {}, valueText(sheet)),
        h("span", { class: "muted" }, ` (${offText([total], value, sheet.unit)})`),
      ),
    );
  }
  return line;
}

// what only rounding has left over is not shown where it is nothing but zeros
const isSeen = (one, format) => !one.isRounding || /[1-9]/.test(format(one.units));

// how far sums are off a value: nothing where all the digits that are shown are the same
function offText(totals, value, unit) {
  const off = sizeOf(totals.map((total) => total * unit - value));
  return totals.every((total) => total === Math.round(value / unit))
    ? "the same in all digits"
    : `off by ${totals.length > 1 ? "at most " : ""}${off.toExponential(1)}`;
}

const valueText = (sheet) => exactly(sheet.value / sheet.unit, sheet.unit);

// the rows under a group's components: what was left out, `rest` and `bias`
function footOf(group, hidden = [0, 0]) {
  const count = group.others[0] + hidden[0],
    units = group.others[1] + hidden[1];
  return [
    ...(count || units ? [{ label: count ? counted(count, "other") : "rounding", units, isRounding: !count }] : []),
    ...["rest", "bias"].filter((name) => group[name] !== null).map((name) => ({ label: name, units: group[name] })),
  ];
}

const ORDERS = {
  label: (a, b) => a.label.localeCompare(b.label, "en", { numeric: true }),
  share: (a, b) => a.units - b.units,
  size: (a, b) => Math.abs(a.units) - Math.abs(b.units),
};

const USUAL_ORDER = "size:descending";

// a table's order, [key, direction], and whether all its rows are shown
const orderOf = (id) => (state.get(`sort.${id}`) ?? USUAL_ORDER).split(":");
const isWhole = (id) => state.get(`all.${id}`) !== null;
const lookOf = (id) => `${orderOf(id)} ${isWhole(id)}`;

// the tables on the page by their ids: what draws their rows, and how they were drawn
const tables = new Map();
function redrawTables() {
  for (const [id, table] of tables) {
    if (table.drawn === lookOf(id)) continue;
    table.drawn = lookOf(id);
    table.draw();
  }
}

const bar = ({ units, sign = units }, largest) =>
  h(
    "span",
    { class: "bar", "aria-hidden": "true" },
    h("span", {
      class: sign < 0 ? "negative" : "positive",
      style: { width: `${largest && units ? Math.max(0.5, (100 * Math.abs(units)) / largest) : 0}%` },
    }),
  );

// a row; pick() chooses it, or is null
function rowLine(row, { pick, isPicked, format, largest }) {
  const choose = (event) => {
    event.stopPropagation();
    pick();
  };
  const attributes = { type: "button", class: "name", "aria-pressed": String(isPicked), onclick: choose };
  return h(
    "tr",
    { class: isPicked ? "picked" : null, title: row.say, onclick: pick },
    h("th", { scope: "row" }, pick ? h("button", attributes, bdi(row.label)) : bdi(row.label)),
    h("td", { class: "number" }, format(row.units)),
    h("td", { class: "bars" }, bar(row, largest)),
  );
}

// the head, whose buttons sort: names are {label, share, size}; mark([key, direction]) shows the order
function tableHead(id, names) {
  const next = (name) => {
    const [key, direction] = orderOf(id),
      first = name === "label" ? "ascending" : "descending";
    return key !== name ? first : direction === "descending" ? "ascending" : "descending";
  };
  const sort = (name) => {
    const order = `${name}:${next(name)}`;
    state.set({ [`sort.${id}`]: order === USUAL_ORDER ? null : order });
  };
  const cell = (name) => {
    const arrow = h("span", { class: "arrow", "aria-hidden": "true" });
    const button = h("button", { type: "button", class: "sort", onclick: () => sort(name) }, names[name], " ", arrow);
    return h("th", { scope: "col", class: name === "share" ? "number" : null }, button);
  };
  const cells = Object.keys(names).map((name) => [name, cell(name)]);
  const mark = ([key, direction]) => {
    for (const [name, one] of cells) {
      one.setAttribute("aria-sort", name === key ? direction : "none");
      one.querySelector(".arrow").textContent = name !== key ? "" : direction === "descending" ? "↓" : "↑";
    }
  };
  return { element: h("thead", {}, h("tr", {}, ...cells.map(([, one]) => one))), mark };
}

// what stands under the rows, and their sum where there is one
function tableFoot(foot, total, totalName, unit) {
  const format = formatter(sizeOf([total ?? 0, ...foot.map((one) => one.units)]), unit);
  const under = (label, units, name) =>
    h(
      "tr",
      { class: name },
      h("th", { scope: "row" }, bdi(label)),
      h("td", { class: "number", "data-units": units }, format(units)),
      h("td"),
    );
  const lines = foot.filter((one) => isSeen(one, format)).map((one) => under(one.label, one.units, "under"));
  if (total !== null) lines.push(under(totalName, total, "total"));
  return foot.length || total !== null ? h("tfoot", {}, ...lines) : null;
}

// rows: [{label, units, say?, sign?}], foot: [{label, units}], total: units or null; pick(row) where rows are chosen;
// a bar has the colour of its `sign`, where that is not the number's own; `word` says what the numbers are
function shareTable({
  id,
  caption,
  head = "Component",
  rows,
  foot = [],
  total = null,
  totalName = "sum",
  sheet,
  pick,
  isPicked,
  canPick = () => true,
  word = "share",
  lines,
  most = 12,
}) {
  const largest = sizeOf(rows.map((row) => row.units));
  const format = formatter(sizeOf([largest, ...(rows.length ? [] : foot.map((one) => one.units))]), sheet.unit);
  const headed = tableHead(id, { label: head, share: word[0].toUpperCase() + word.slice(1), size: "Size" });
  const body = h("tbody"),
    more = h("button", {
      type: "button",
      class: "quiet more",
      onclick: () => state.set({ [`all.${id}`]: isWhole(id) ? null : 1 }),
    });
  const sorted = () => {
    const [key, direction] = orderOf(id),
      found = [...rows].sort(ORDERS[key]);
    return direction === "descending" ? found.reverse() : found;
  };
  const line = (row) =>
    rowLine(row, {
      pick: pick && canPick(row) ? () => pick(row) : null,
      isPicked: Boolean(isPicked?.(row)),
      format,
      largest,
    });
  const draw = () => {
    headed.mark(orderOf(id));
    body.replaceChildren(
      ...sorted()
        .slice(0, isWhole(id) ? rows.length : most)
        .map(line),
    );
    more.hidden = rows.length <= most;
    more.textContent = isWhole(id) ? "Show fewer" : `Show all ${written(rows.length)}`;
  };
  draw();
  tables.set(id, { draw, drawn: lookOf(id) });

  const csv = () => {
    const all = [...sorted(), ...foot, ...(total === null ? [] : [{ label: totalName, units: total }])];
    const cells = all.map((row) => [row.label, plainly(row.units, sheet.unit)]);
    download(`${id}.csv`, csvOf(["label", word], cells), "text/csv");
  };
  const picture = () => {
    const shown = sorted().slice(0, 30),
      hidden = sorted().slice(30);
    const rest = { label: counted(hidden.length, "more row"), units: sumOf(hidden.map((row) => row.units)) };
    const sums = total === null ? [] : [`${totalName} ${exactly(total, sheet.unit)}`];
    const under = [...(hidden.length ? [rest] : []), ...foot];
    return barsPicture(shown, under, sheet.unit, word, [...lines(), ...sums, ...warningsOf(sheet)]);
  };
  const saving = { type: "button", class: "quiet", "data-export": "csv", "aria-label": "Download the table as CSV" };
  return h(
    "div",
    { class: "ranking" },
    h("div", { class: "tools" }, h("button", { ...saving, onclick: csv }, "CSV"), ...exportButtons(id, picture)),
    h(
      "table",
      { class: "shares", "data-table": id },
      h("caption", { class: "unseen" }, caption),
      headed.element,
      body,
      tableFoot(foot, total, totalName, sheet.unit),
    ),
    more,
  );
}
