"use strict";
// Draw every figure with the page's own ink, and again when light turns to dark or back.
(function () {
  const specs = Array.from(document.querySelectorAll("script[data-figure]"), (node) => ({
    target: document.getElementById(node.dataset.figure),
    figure: JSON.parse(node.textContent),
  }));
  function template() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: read("--rule"), linecolor: read("--rule"), automargin: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: read("--ink"), family: read("--sans"), size: 13 },
        xaxis: axis,
        yaxis: axis,
        hoverlabel: { bgcolor: read("--panel"), font: { color: read("--ink") } },
      },
    };
  }
  function draw() {
    for (const { target, figure } of specs) {
      const layout = Object.assign({}, figure.layout, { template: template(), autosize: true });
      Plotly.react(target, figure.data, layout, {
        displayModeBar: false,
        responsive: true,
      });
    }
  }
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // On paper nothing can be unfolded.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details.print").forEach((d) => { d.open = true; });
  });
})();
