function render({ model, el }) {
  const add = (tag, parent) => parent.appendChild(document.createElement(tag));
  const frame = add("div", el), image = add("img", frame), mark = add("span", frame), caption = add("p", el);
  const [rows, columns] = [model.get("rows"), model.get("columns")];
  const picked = () => [Math.floor(model.get("picked") / columns), model.get("picked") % columns];
  const pick = (row, column) => {
    if (!model.get("clickable")) return;
    const within = (value, count) => Math.min(Math.max(Math.floor(value), 0), count - 1);
    model.set("picked", within(row, rows) * columns + within(column, columns));
    model.save_changes();
  };
  el.classList.add("siglip-patches");
  const ariaLabel = `Picture of ${rows} by ${columns} patches; arrow keys pick one`;
  Object.assign(frame, { tabIndex: 0, role: "application", ariaLabel });
  caption.ariaLive = "polite";
  frame.onclick = ({ clientX, clientY }) => {
    const { left, top, width, height } = image.getBoundingClientRect();
    pick(((clientY - top) / height) * rows, ((clientX - left) / width) * columns);
  };
  frame.onkeydown = (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps)) return;
    event.preventDefault();  // else the page scrolls, or JupyterLab goes to another cell
    pick(picked()[0] + steps[event.key][0], picked()[1] + steps[event.key][1]);
  };
  const show = () => {
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(new Blob([model.get("image")], { type: "image/png" }));
  };
  const tell = () => {
    const [row, column] = picked(), [width, height] = [100 / columns, 100 / rows];
    caption.textContent = image.alt = model.get("caption");
    mark.hidden = !model.get("clickable");
    mark.style = `left: ${column * width}%; top: ${row * height}%; width: ${width}%; height: ${height}%`;
  };
  model.on("change:image", show);
  model.on("change:caption change:picked change:clickable", tell);
  show(), tell();
  return () => URL.revokeObjectURL(image.src);
}
export default { render };
