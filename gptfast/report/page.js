// A reading under the pointer: the nearest point of the curve, its place and its value.
for (const chart of document.querySelectorAll("svg.chart")) {
  const curves = [...chart.querySelectorAll("path[data-points]")].map((path) =>
    path.dataset.points.split(";").map((point) => point.split(",")));
  if (!curves.length) continue;
  const make = (name) => chart.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  const dot = make("circle"), text = make("text");
  dot.setAttribute("r", 3.6);
  dot.setAttribute("class", "end");
  text.setAttribute("class", "end reading");
  const show = (visible) => {
    for (const part of [dot, text]) part.style.display = visible ? "" : "none";
    chart.classList.toggle("read", visible);
  };
  show(false);
  chart.addEventListener("pointerleave", () => show(false));
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect(), view = chart.viewBox.baseVal;
    const at = (event.clientX - box.left) / box.width * view.width;
    const points = curves[0];
    const [x, y, where, value] = points.reduce((a, b) =>
      Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
    text.setAttribute("x", Math.min(Math.max(x, 60), view.width - 60));
    text.setAttribute("y", y > 40 ? y - 12 : +y + 22);
    text.setAttribute("text-anchor", "middle");
    text.textContent = `${value} at ${where}`;
    show(true);
  });
}
