// What the nearest mark of a picture is, and a legend whose entries keep their series alone.
const REACH = 24; // pixels, between a pointer and a mark
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;

function far(mark, x, y) { // from a mark's box; inside of it, the smaller one is nearer
  const b = mark.getBoundingClientRect();
  const outside = Math.hypot(Math.max(b.left - x, 0, x - b.right), Math.max(b.top - y, 0, y - b.bottom));
  return outside || -1 / (1 + b.width * b.height);
}

function show(mark, x, y) {
  tip.hidden = !mark;
  if (!mark) return;
  const [name, ...numbers] = mark.told.split("\n");
  tip.replaceChildren(Object.assign(document.createElement("strong"), { textContent: name }), "\n" + numbers.join("\n"));
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 6)) + "px";
  tip.style.top = Math.max(4, y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 14 : y + 14) + "px";
}

document.querySelectorAll("figure svg").forEach(svg => {
  const marks = [...svg.querySelectorAll("title")].map(title => {
    const mark = title.parentNode;
    mark.told = title.textContent;
    title.remove(); // the browser would show it a second time
    return mark;
  });
  const seen = mark => !mark.closest(".faded");
  let at = null;
  const point = event => {
    const near = marks.filter(seen).map(mark => [far(mark, event.clientX, event.clientY), mark]).filter(([d]) => d < REACH);
    const [, mark] = near.length ? near.reduce((a, b) => (b[0] < a[0] ? b : a)) : [];
    at?.classList.remove("at");
    (at = mark)?.classList.add("at");
    show(mark, event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => { at?.classList.remove("at"); show(); });

  const keys = [...svg.querySelectorAll(".key")];
  const keep = key => {
    const series = key.getAttribute("aria-pressed") === "true" ? null : key.dataset.keeps;
    keys.forEach(each => each.setAttribute("aria-pressed", each.dataset.keeps === series));
    svg.querySelectorAll("[data-series], .key").forEach(each =>
      each.classList.toggle("faded", series !== null && (each.dataset.series ?? each.dataset.keeps) !== series));
  };
  keys.forEach(key => {
    const { x, y, width, height } = key.getBBox();
    const area = document.createElementNS(svg.namespaceURI, "rect"); // its gaps are to be clicked as well
    Object.entries({ x, y, width, height, fill: "transparent" }).forEach(([name, value]) => area.setAttribute(name, value));
    key.prepend(area);
    key.addEventListener("click", () => keep(key));
    key.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); keep(key); }
    });
  });
});
