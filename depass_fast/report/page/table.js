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

// the tables on the page by their ids: what draws their rows, and the order and length in which they were drawn
const tables = new Map();
const orderOf = (id) => `${state.get(`sort.${id}`)} ${state.get(`all.${id}`)}`;
function reorderTables() {
  for (const [id, table] of tables) {
    if (table.drawn === orderOf(id)) continue;
    table.drawn = orderOf(id);
    table.draw();
  }
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
  const body = h("tbody"),
    table = h("table", { class: "shares", "data-table": id }, h("caption", { class: "unseen" }, caption));
  let key, direction, isWhole;
  const read = () => {
    [key, direction] = (state.get(`sort.${id}`) ?? "size:descending").split(":");
    isWhole = state.get(`all.${id}`) !== null;
  };

  const sorted = () => {
    const found = [...rows].sort(ORDERS[key]);
    return direction === "descending" ? found.reverse() : found;
  };
  const bar = ({ units, sign = units }) =>
    h(
      "span",
      { class: "bar", "aria-hidden": "true" },
      h("span", {
        class: sign < 0 ? "negative" : "positive",
        style: { width: `${largest && units ? Math.max(0.5, (100 * Math.abs(units)) / largest) : 0}%` },
      }),
    );
  const fill = () => {
    const all = sorted(),
      shown = isWhole ? all : all.slice(0, most);
    body.replaceChildren(
      ...shown.map((row) => {
        const picked = Boolean(isPicked?.(row));
        const name =
          pick && canPick(row)
            ? h(
                "button",
                {
                  type: "button",
                  class: "name",
                  "aria-pressed": String(picked),
                  onclick: (event) => {
                    event.stopPropagation();
                    pick(row);
                  },
                },
                bdi(row.label),
              )
            : bdi(row.label);
        const line = h(
          "tr",
          { class: picked ? "picked" : null, title: row.say },
          h("th", { scope: "row" }, name),
          h("td", { class: "number" }, format(row.units)),
          h("td", { class: "bars" }, bar(row)),
        );
        if (pick && canPick(row)) line.addEventListener("click", () => pick(row));
        return line;
      }),
    );
    more.hidden = all.length <= most;
    more.textContent = isWhole ? "Show fewer" : `Show all ${written(all.length)}`;
  };
  const heads = {
    label: h("th", { scope: "col" }),
    share: h("th", { scope: "col", class: "number" }),
    size: h("th", { scope: "col" }),
  };
  const names = { label: head, share: word[0].toUpperCase() + word.slice(1), size: "Size" };
  const headed = () => {
    for (const [name, cell] of Object.entries(heads)) {
      cell.setAttribute("aria-sort", name === key ? direction : "none");
      cell.querySelector(".arrow").textContent = name === key ? (direction === "descending" ? "↓" : "↑") : "";
    }
  };
  for (const [name, cell] of Object.entries(heads)) {
    cell.append(
      h(
        "button",
        {
          type: "button",
          class: "sort",
          onclick: () => {
            const first = name === "label" ? "ascending" : "descending";
            const next = key !== name ? first : direction === "descending" ? "ascending" : "descending";
            const order = `${name}:${next}`;
            state.set({ [`sort.${id}`]: order === "size:descending" ? null : order });
          },
        },
        names[name],
        " ",
        h("span", { class: "arrow", "aria-hidden": "true" }),
      ),
    );
  }
  const more = h("button", {
    type: "button",
    class: "quiet more",
    onclick: () => state.set({ [`all.${id}`]: isWhole ? null : 1 }),
  });
  const footFormat = formatter(sizeOf([total ?? 0, ...foot.map((one) => one.units)]), sheet.unit);
  const under = (label, units, name) =>
    h(
      "tr",
      { class: name },
      h("th", { scope: "row" }, bdi(label)),
      h("td", { class: "number", "data-units": units }, footFormat(units)),
      h("td"),
    );
  table.append(h("thead", {}, h("tr", {}, ...Object.values(heads))), body);
  if (foot.length || total !== null) {
    const seen = foot.filter((one) => isSeen(one, footFormat));
    table.append(
      h(
        "tfoot",
        {},
        ...seen.map((one) => under(one.label, one.units, "under")),
        ...(total === null ? [] : [under(totalName, total, "total")]),
      ),
    );
  }
  const draw = () => {
    read();
    headed();
    fill();
  };
  draw();
  tables.set(id, { draw, drawn: orderOf(id) });

  const csv = () => {
    const all = [...sorted(), ...foot, ...(total === null ? [] : [{ label: totalName, units: total }])];
    download(
      `${id}.csv`,
      csvOf(
        ["label", word],
        all.map((row) => [row.label, plainly(row.units, sheet.unit)]),
      ),
      "text/csv",
    );
  };
  const picture = () => {
    const shown = sorted().slice(0, 30),
      hidden = sorted().slice(30);
    const left = hidden.length
      ? [{ label: `${hidden.length} more rows`, units: sumOf(hidden.map((row) => row.units)) }]
      : [];
    const sums = total === null ? [] : [`${totalName} ${exactly(total, sheet.unit)}`];
    return barsPicture(shown, [...left, ...foot], sheet.unit, word, [...lines(), ...sums, ...warningsOf(sheet)]);
  };
  const tools = h(
    "div",
    { class: "tools" },
    h(
      "button",
      { type: "button", class: "quiet", "data-export": "csv", "aria-label": "Download the table as CSV", onclick: csv },
      "CSV",
    ),
    ...exportButtons(id, picture),
  );
  return h("div", { class: "ranking" }, tools, table, more);
}
