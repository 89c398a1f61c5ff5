// Pictures by Vega-Lite, or by Vega where a spec says so. What is exported is the picture with its title, its sum and
// all warnings in it.

const exporters = new Map(); // id -> () => {spec, lines}; for the buttons, and for tests

const VEGA = "https://vega.github.io/schema/vega/v6.json"; // a name: nothing is fetched
const FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif";

function themed(spec) {
  const ink = colour("ink"),
    muted = colour("muted"),
    line = colour("line");
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    background: null,
    ...spec,
    config: {
      font: FONT,
      view: { stroke: null },
      axis: {
        labelColor: muted,
        titleColor: muted,
        domainColor: line,
        tickColor: line,
        gridColor: line,
        labelFontSize: 11,
        titleFontSize: 11,
        titleFontWeight: "normal",
      },
      legend: { labelColor: muted, titleColor: muted, labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal" },
      title: {
        color: ink,
        font: FONT,
        subtitleFont: FONT,
        subtitleColor: muted,
        fontSize: 15,
        subtitleFontSize: 12,
        anchor: "start",
        offset: 14,
        subtitlePadding: 6,
        subtitleLineHeight: 17,
        lineHeight: 20,
      },
      text: { color: ink },
      ...spec.config,
    },
  };
}

const diverging = (largest) => ({
  type: "pow",
  exponent: 0.5,
  interpolate: "rgb",
  domain: [-largest || -1, 0, largest || 1],
  range: [colour("negative"), colour("middle"), colour("positive")],
});

const drawn = (element, spec, renderer = "svg") =>
  vegaEmbed(element, themed(spec), {
    mode: spec.$schema === VEGA ? "vega" : "vega-lite",
    renderer,
    actions: false,
    ast: true,
    hover: false,
  });

// a text in lines of at most `most` characters, broken at spaces
function broken(text, most) {
  const found = [""];
  for (const word of text.split(" ")) {
    const longer = found.at(-1) ? `${found.at(-1)} ${word}` : word;
    if (longer.length > most && found.at(-1)) found.push(word);
    else found[found.length - 1] = longer;
  }
  return found;
}

// the spec of a picture as it is exported: `lines` are its title and what stands under it
function exported(spec, lines) {
  const most = Math.max(72, Math.round(((Number(spec.width) || 0) + 80) / 6.4)); // characters of a line
  const [text, subtitle] = [
    broken(visible(lines[0]), most * 0.8),
    lines.slice(1).flatMap((line) => broken(visible(line), most)),
  ];
  return { ...spec, title: { text, subtitle }, background: colour("card"), padding: 20 };
}

function warningsOf(sheet) {
  const how = `${sheet.exact ? "Exact" : "Approximate"}; completeness error ${sheet.error.toExponential(1)}.`;
  const made = [`Prompt: '${sheet.excerpt}'`, sheet.made_with ?? data.made_by];
  return [...sheet.warnings.map((text) => `Warning: ${text}.`), how, ...sheet.notes, ...made];
}

async function exportPicture(id, form) {
  const { spec, lines } = exporters.get(id)();
  const holder = h("div", { style: { position: "absolute", left: "-99999px", top: "0" }, "aria-hidden": "true" });
  document.body.append(holder);
  try {
    const { view } = await drawn(holder, exported(spec, lines));
    const made = form === "svg" ? await view.toSVG() : await view.toImageURL("png", 2);
    download(`${id}.${form}`, made, form === "svg" ? "image/svg+xml" : undefined);
    view.finalize();
  } finally {
    holder.remove();
  }
}

function exportButtons(id, make) {
  exporters.set(id, make);
  const button = (form) =>
    h(
      "button",
      {
        type: "button",
        class: "quiet",
        "data-export": form,
        "aria-label": `Download the picture as ${form.toUpperCase()}`,
        onclick: () => exportPicture(id, form),
      },
      form.toUpperCase(),
    );
  return [button("svg"), button("png")];
}

// horizontal bars, for export: what a table on the page shows. Rows make the scale; what is under them is grey, and cut
function barsSpec(rows, foot, unit, word = "share") {
  const all = [...rows, ...foot],
    largest = sizeOf((rows.length ? rows : all).map((row) => row.units)),
    format = formatter(largest, unit);
  const values = all.map(({ label, units, sign = units }, i) => {
    const shown = Math.max(-largest, Math.min(largest, units));
    return {
      i,
      label: visible(label),
      value: shown * unit,
      sign: i < rows.length ? Math.sign(sign) : 0,
      isCut: shown !== units,
      text: format(units),
    };
  });
  return {
    data: { values },
    width: 420,
    height: { step: 20 },
    encoding: {
      y: {
        field: "i",
        type: "ordinal",
        sort: null,
        title: null,
        axis: { labelExpr: "names[datum.value]", ticks: false, domain: false, labelLimit: 220, labelPadding: 8 },
      },
    },
    params: [{ name: "names", value: values.map((one) => one.label) }],
    layer: [
      {
        mark: { type: "bar", cornerRadius: 2, height: 13 },
        encoding: {
          x: { field: "value", type: "quantitative", title: word, axis: { tickCount: 5 } },
          color: {
            condition: [
              { test: "datum.sign < 0", value: colour("negative") },
              { test: "datum.sign > 0", value: colour("positive") },
            ],
            value: colour("muted"),
          },
          opacity: { condition: { test: "datum.sign === 0", value: 0.55 }, value: 1 },
        },
      },
      {
        mark: {
          type: "text",
          text: { expr: "!datum.isCut ? '' : datum.value < 0 ? '◀ ' : ' ▶'" },
          align: { expr: "datum.value < 0 ? 'left' : 'right'" },
          fontSize: 11,
        },
        encoding: { x: { field: "value", type: "quantitative" } },
      },
      {
        mark: { type: "text", align: "left", dx: 6, fontSize: 11 },
        encoding: { x: { value: 420 }, text: { field: "text" } },
      },
    ],
  };
}

// a picture of bars with its lines; that some are cut is one of them
function barsPicture(rows, foot, unit, word, lines) {
  const spec = barsSpec(rows, foot, unit, word),
    cut = spec.data.values.some((one) => one.isCut) ? ["Grey bars with an arrow are longer than they are drawn."] : [];
  return { spec, lines: [...lines, ...cut] };
}
