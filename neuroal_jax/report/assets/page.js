
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 44rem)");

// What depends on the reader's screen; everything else is in the figures.
function template() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = {gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true};
  const below = {orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom"};
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: color("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13},
      hoverlabel: {bgcolor: color("--panel"), bordercolor: color("--line"), font: {color: color("--ink")}},
      legend: narrow.matches ? below : {},
      margin: {t: 16, r: 16, b: 48, l: 48},
      xaxis: axis,
      yaxis: axis,
    },
  };
}

function draw() {
  const look = template();
  for (const [name, figure] of Object.entries(figures)) {
    const legend = figure.data.filter((trace) => trace.showlegend !== false).length;
    const room = narrow.matches && legend > 1 ? 20 * legend : 0;
    const layout = {...structuredClone(figure.layout), template: look, height: figure.layout.height + room};
    const bar = narrow.matches ? false : "hover";
    Plotly.react(name, figure.data, layout, {responsive: true, displaylogo: false, displayModeBar: bar});
  }
}

// Numbers by size, text by letters, missing values last in both directions.
function compare(a, b) {
  const x = a.dataset.value, y = b.dataset.value;
  if (!x || !y) return null;
  const numbers = [Number(x), Number(y)];
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
