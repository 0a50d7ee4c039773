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
      // Beside a narrow figure a legend would leave no room for it: put it underneath.
      if (layout.legend && layout.legend.orientation === "v" && target.clientWidth < 760) {
        const lines = figure.data.filter((trace) => trace.showlegend !== false).length;
        layout.legend = { orientation: "h", x: 0, y: -0.28, yanchor: "top" };
        layout.height = figure.layout.height + 26 * Math.ceil(lines / 2);
        target.style.height = layout.height + "px";
      }
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
