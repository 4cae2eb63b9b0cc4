"use strict";

// The figures name their colours ("--today"); the style sheet says what they are, in light and in dark.
function coloured(value, style) {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  const out = {};
  for (const [key, item] of Object.entries(value)) {
    const named = key.endsWith("color") && typeof item === "string" && item.startsWith("--");
    out[key] = named ? style.getPropertyValue(item).trim() : coloured(item, style);
  }
  return out;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const figure of document.querySelectorAll("figure")) {
    const { data, layout } = coloured(JSON.parse(figure.querySelector("script").textContent), style);
    Plotly.react(figure.querySelector(".plot"), data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
