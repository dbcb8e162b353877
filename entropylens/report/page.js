"use strict";
// What the page holds is packed; the browser unpacks it, and nothing is loaded.
async function unpack(id) {
  const packed = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const root = document.documentElement;

function colors() {
  const style = getComputedStyle(root);
  const [ink, line, raised] = ["--ink", "--line", "--raised"].map((it) => style.getPropertyValue(it));
  const changed = { "font.color": ink, "hoverlabel.bgcolor": raised, "hoverlabel.font.color": ink,
    "modebar.bgcolor": raised, "modebar.color": ink };
  return { ink, line, changed };
}

function paint(plot) {
  const { ink, line, changed } = colors();
  for (const axis of Object.keys(plot.layout).filter((it) => /^[xy]axis/.test(it))) {
    changed[`${axis}.gridcolor`] = line;
    changed[`${axis}.linecolor`] = ink;
    changed[`${axis}.tickcolor`] = ink;
  }
  return Plotly.relayout(plot, changed);
}

function wear(theme) {
  root.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "light" : "dark";
  all(".plot.drawn").forEach(paint);
}

// A button a legend entry: it works with a keyboard, and at the width of a phone.
function legend(figure, plot) {
  const holder = figure.querySelector(".legend");
  for (const trace of plot.data.filter((it) => it.showlegend !== false)) {
    const button = document.createElement("button");
    const swatch = document.createElement("i");
    swatch.style.background = trace.line.color;
    button.append(swatch, trace.name);
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      const group = plot.data.flatMap((it, place) =>
        it.legendgroup === trace.legendgroup ? [place] : []);
      Plotly.restyle(plot, { visible: on }, group);
    };
    holder.append(button);
  }
}

// Arrow keys go from layer to layer and tell what each trace is there.
function walk(figure, plot) {
  const told = figure.querySelector(".told");
  const layers = [...new Set(plot.data.flatMap((it) => it.customdata || []))].sort((a, b) => a - b);
  let place = -1;
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    place = Math.min(layers.length - 1, Math.max(0, place + step));
    const layer = layers[place];
    const values = [];
    const points = [];
    plot.data.forEach((trace, curveNumber) => {
      const pointNumber = (trace.customdata || []).indexOf(layer);
      if (pointNumber < 0 || trace.visible === false || trace.y[pointNumber] === null) return;
      points.push({ curveNumber, pointNumber });
      values.push(`${trace.meta} ${trace.y[pointNumber].toFixed(4)}`);
    });
    told.textContent = `layer ${layer}: ${values.join(", ")}`;
    Plotly.Fx.hover(plot, points.slice(0, 1));
  });
}

async function draw(figure, spec) {
  const plot = figure.querySelector(".plot");
  const config = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" },
    modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    showSendToCloud: false, plotlyServerURL: "" };  // nothing of a page goes anywhere
  await Plotly.newPlot(plot, spec.data, spec.layout, config);
  plot.classList.add("drawn");
  await paint(plot);
  legend(figure, plot);
  walk(figure, plot);
}

function number(text) {
  return text.trim() === "" ? -Infinity : Number(text);
}

function sortable(table) {
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("th", table).forEach((it) => it.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = all("tbody tr", table);
      const text = (row) => row.cells[column].textContent;
      const numeric = rows.every((row) => !Number.isNaN(number(text(row))));
      rows.sort((one, other) => numeric ? number(text(one)) - number(text(other))
        : text(one).localeCompare(text(other)));
      if (down) rows.reverse();
      table.tBodies[0].append(...rows);
    };
  });
}

function download(button, csv) {
  button.onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
    link.download = button.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
}

// The cells of a response: pointing at one or going there with the arrow keys tells what it is.
function tokens(views) {
  const holder = document.getElementById("token-view");
  const told = document.getElementById("told-token");
  const chosen = document.getElementById("response");
  const tell = (cell) => { if (cell && cell.title) told.textContent = cell.title; };
  holder.addEventListener("pointerover", (event) => tell(event.target.closest("td")));
  holder.addEventListener("focusin", (event) => tell(event.target.closest("td")));
  holder.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!cell || !step) return;
    event.preventDefault();
    const rows = cell.closest("tbody").rows;
    const row = rows[cell.parentElement.sectionRowIndex + step[0]];
    const next = row && row.cells[cell.cellIndex + step[1]];
    if (!next || next.tagName !== "TD") return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  const show = () => {
    holder.innerHTML = views[chosen.value - 1];
    const first = holder.querySelector("td");
    first.tabIndex = 0;
    tell(first);
  };
  chosen.onchange = show;
  show();
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  wear(dark.matches ? "dark" : "light");
  dark.onchange = () => wear(dark.matches ? "dark" : "light");
  document.getElementById("theme").onclick = () =>
    wear(root.dataset.theme === "dark" ? "light" : "dark");
  all(".wide table").forEach(sortable);
  const held = JSON.parse(await unpack("held"));
  all("[data-file]").forEach((button) => download(button, held.files[button.dataset.file]));
  if (held.views.length) tokens(held.views);
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  for (const figure of all("figure[id]")) await draw(figure, held.charts[figure.id]);
  root.dataset.ready = "yes";
}
start().catch((error) => {
  const said = document.createElement("p");
  said.setAttribute("role", "alert");
  said.textContent = `This page could not be drawn (${error}). It needs a browser of 2023 or later.`;
  document.querySelector("main").prepend(said);
});
