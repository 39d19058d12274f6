
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 44rem)");
// Nothing leaves the page: by default Plotly's toolbar offers to upload the chart to its makers' cloud.
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ""};
const below = {orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom"};

// The figures' template, with what depends on the reader's screen: its colours, and legends below narrow plots.
function themed(template) {
  const look = structuredClone(template), layout = look.layout;
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  layout.font.color = color("--ink");
  layout.hoverlabel = {bgcolor: color("--panel"), bordercolor: color("--line"), font: {color: color("--ink")}};
  Object.assign(layout.modebar, {color: color("--soft"), activecolor: color("--ink")});
  for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, {gridcolor: color("--line"), linecolor: color("--line")});
  if (narrow.matches) Object.assign(layout.legend, below);
  return look;
}

function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    const legend = figure.data.filter((trace) => trace.showlegend !== false).length;
    const room = narrow.matches && legend > 1 ? 20 * legend : 0;
    const layout = structuredClone(figure.layout);
    Object.assign(layout, {template: themed(layout.template), height: layout.height + room});
    Plotly.react(name, figure.data, layout, config);
  }
}

// Numbers by size, text by letters, missing values last in both directions.
function compare(a, b) {
  const x = a.dataset.value, y = b.dataset.value;
  if (!x || !y) return null;
  const numbers = [x, y].map((text) => Number(text === "inf" ? "Infinity" : text));
  return numbers.some(Number.isNaN) ? x.localeCompare(y) : numbers[0] - numbers[1];
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const cell = (row) => row.cells[column];
  const missing = (row) => (cell(row).dataset.value ? 0 : 1);
  const rows = [...body.rows];
  rows.sort((a, b) => missing(a) - missing(b) || direction * (compare(cell(a), cell(b)) ?? 0));
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sort(table, column, up ? 1 : -1);
    });
  });
}

dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
