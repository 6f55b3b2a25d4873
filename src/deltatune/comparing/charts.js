// Draws every chart in its place, as wide as that is, and again when the width of the page changes.
const charts = JSON.parse(document.getElementById("charts").textContent);
const drawn = {};
function draw(name, spec) {
  const box = document.getElementById("plot-" + name);
  const width = box.clientWidth;
  if (drawn[name] === width) return;
  drawn[name] = width;
  spec = structuredClone(spec);
  if (spec.columns) {
    spec.columns = Math.max(2, Math.floor(width / 240));
    if (width < 480) spec.spacing = 12;
    spec.spec.width = Math.floor((width - 44) / spec.columns) - spec.spacing;
    spec.config.header.labelLimit = spec.spec.width;
  }
  // On a narrow page the names beside a chart need a larger part of it.
  for (const parameter of spec.params ?? []) if (parameter.name === "names" && width < 620) parameter.value = 0.6;
  return vegaEmbed(box, spec, {mode: "vega-lite", renderer: "svg", actions: false});
}
function drawAll() {
  return Promise.all(Object.entries(charts).map(([name, spec]) => draw(name, spec)));
}
drawAll().then(() => document.documentElement.dataset.drawn = "true");
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
