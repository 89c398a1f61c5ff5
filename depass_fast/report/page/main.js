// The page: its head, the sums that stay in view, a card for each view, and what is to be known.

const data = JSON.parse(document.getElementById("data").textContent);

function reacting(page, keys, render) {
  let before = null;
  const run = () => {
    const now = JSON.stringify(keys.map((key) => state.get(key)));
    if (now === before) return;
    before = now;
    render();
  };
  state.listeners.push(run);
  run();
}

function card({ id, title, lead, tools = [] }, ...children) {
  return h(
    "section",
    { class: "card", id: `view-${id}`, "aria-labelledby": `title-${id}` },
    h("div", { class: "row" }, h("h2", { id: `title-${id}` }, title), h("div", { class: "tools" }, ...tools)),
    lead ? h("p", { class: "lead" }, lead) : null,
    ...children,
  );
}

const exportButtonsOf = (id) => exportButtons(id, exporters.get(id));

function manySums(totals, sheet) {
  if (sheet.own_sums) return h("p", { class: "sum muted" }, `${sheet.own_sums}: choose one to see it`);
  return h(
    "p",
    { class: "sum" },
    h(
      "span",
      { class: "part" },
      h(
        "span",
        { class: "muted" },
        totals.length === 1
          ? `the sum is the ${sheet.what}`
          : `split in ${written(totals.length)} ways, each of which sums to the ${sheet.what}`,
      ),
      " ",
      h("strong", {}, valueText(sheet)),
      h("span", { class: "muted" }, ` (${offText(totals, sheet.value, sheet.unit)})`),
    ),
  );
}

function legend() {
  const steps = [-1, -0.5, -0.15, 0, 0.15, 0.5, 1];
  return h(
    "p",
    { class: "legend" },
    h("span", {}, "lowers"),
    h(
      "span",
      {
        class: "scale",
        role: "img",
        "aria-label": "Colours: blue lowers the value, orange raises it; the stronger, the larger",
      },
      ...steps.map((step) => h("span", { style: { background: shade(step * 1000, 1000) } })),
    ),
    h("span", {}, "raises"),
  );
}

function chips(sheet) {
  const names = {
    position: (value) => ["position", `${tokenName(sheet, value)}@${value}`],
    layer: (value) => [
      "layer",
      `${value}${["attention", "mlp"].includes(state.get("part")) ? ` ${state.get("part")}` : ""}`,
    ],
    head: (value) => ["head", value],
    neuron: (value) => ["neuron", value],
    node: (value) => ["node", nodeName(sheet, value)],
    path: (value) => ["path", value],
  };
  const holder = h("div", {
    class: "chips",
    id: "chosen",
    role: "group",
    tabindex: -1,
    "aria-label": "What is chosen",
  });
  state.listeners.push(() => {
    const chosen = Object.keys(names).filter((key) => state.get(key) !== null);
    holder.replaceChildren(
      ...chosen.map((key) => {
        const [name, text] = names[key](state.get(key));
        return h(
          "button",
          {
            type: "button",
            class: "chip",
            "aria-label": `Take back: ${name} ${text}`,
            onclick: () => state.set(key === "layer" ? { layer: null, part: null } : { [key]: null }),
          },
          h("span", { class: "muted" }, name),
          " ",
          bdi(text),
          " ×",
        );
      }),
      ...(chosen.length > 1
        ? [
            h(
              "button",
              {
                type: "button",
                class: "chip",
                onclick: () => state.set(Object.fromEntries(["part", ...Object.keys(names)].map((key) => [key, null]))),
              },
              "Clear all",
            ),
          ]
        : []),
    );
  });
  return holder;
}

function head(sheet) {
  const options = data.sheets.map((one, i) => h("option", { value: i, selected: one === sheet }, visible(one.name)));
  const choose =
    data.sheets.length < 2
      ? null
      : h(
          "label",
          { class: "sheets" },
          h("span", { class: "muted" }, "Shown"),
          " ",
          h(
            "select",
            {
              id: "sheet",
              onchange: (event) =>
                state.set({
                  sheet: event.target.value === "0" ? null : event.target.value,
                  position: null,
                  layer: null,
                  part: null,
                  head: null,
                  neuron: null,
                  node: null,
                  path: null,
                }),
            },
            ...options,
          ),
        );
  return h(
    "header",
    {},
    h("p", { class: "muted brand" }, "depass_fast · report"),
    h("h1", {}, bdi(sheet.target)),
    h("p", { class: "lead" }, bdi(sheet.headline)),
    choose,
    ...sheet.warnings.map((text) =>
      h("p", { class: "warning", role: "note" }, h("strong", {}, "Warning: "), `${text}.`),
    ),
  );
}

// what the sum that stays in view is of: {total, value, what}; of an explanation, that of the key that is chosen
function sumInView(sheet) {
  const keys = sheet.views.find((view) => view.kind === "keys");
  if (keys) {
    const group = chosenKey(keys),
      of = group.key === null ? "" : ` of ${tokenName(sheet, group.key)}@${group.key}`;
    return { total: group.total, value: group.value, what: `${sumNameOf(keys, group)}${of}` };
  }
  const tokens = sheet.views.find((view) => view.kind === "tokens" && view.group.rows.length && !view.word);
  const table = sheet.views.find((view) => view.groups),
    groups = table?.adds ? table.groups : table?.groups.slice(0, 1);
  const total = tokens?.group.total ?? sumOf(groups.map((group) => group.total));
  return { total, value: sheet.value, what: sheet.what };
}

function always(sheet) {
  const fact = (name, value) => h("span", {}, name, " ", value);
  const said = (text) => h("span", { class: "muted" }, text);
  const sum = h("strong", { id: "sum" }),
    value = h("strong", { id: "value" }),
    what = said("");
  const update = () => {
    const found = sumInView(sheet);
    sum.textContent = exactly(found.total, sheet.unit);
    value.textContent = exactly(found.value / sheet.unit, sheet.unit);
    what.replaceChildren(bdi(found.what));
  };
  update();
  state.listeners.push(update);
  return h(
    "div",
    { class: "always", role: "region", "aria-label": "The sum, and what is chosen" },
    h(
      "div",
      { class: "facts" },
      fact(said("shares sum to"), sum),
      fact(what, value),
      fact(said("completeness error"), h("strong", { id: "error" }, sheet.error.toExponential(1))),
      h("span", { class: sheet.exact ? "badge" : "badge doubtful" }, sheet.exact ? "exact" : "approximate"),
      legend(),
    ),
    chips(sheet),
  );
}

function foot(sheet) {
  return h(
    "footer",
    {},
    ...sheet.notes.map((text) => h("p", {}, text)),
    h("p", { class: "muted" }, sheet.about),
    h("p", { class: "muted" }, bdi(sheet.made_with ?? data.made_by)),
  );
}

let shown = null;
function show() {
  const number = state.number("sheet") ?? 0;
  if (shown === number) return;
  shown = number;
  const sheet = data.sheets[number],
    page = { sheet, whenShown: [], whenResized: [] };
  state.listeners = [show];
  exporters.clear();
  tables.clear();
  document.title = `${visible(sheet.target)} · depass_fast`;
  const cards = sheet.views.filter((view) => views[view.kind]).map((view) => views[view.kind](view, sheet, page));
  document.getElementById("page").replaceChildren(head(sheet), always(sheet), h("main", {}, ...cards), foot(sheet));
  page.whenShown.forEach((run) => run()); // now elements have their widths
  state.listeners.push(redrawTables);
  state.tell();
  current = page;
}

let current = null,
  width = 0;
const redraw = () => keepingFocus(() => current?.whenResized.forEach((run) => run()));
addEventListener("resize", () => {
  if (Math.abs(document.body.clientWidth - width) < 24) return;
  width = document.body.clientWidth;
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  shown = null;
  keepingFocus(show);
});
addEventListener("hashchange", () => {
  state.read(data.sheets);
  state.tell();
});

state.read(data.sheets);
width = document.body.clientWidth;
show();
