// A drawing pad. Its value is the drawing as a data URL; "input" is told when the pen lifts. What is drawn stays in the
// browser, so that a reload finds it again.
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const KEPT = "diffusion-kit-pad", UNDO = 30;
const before = []; // pictures to go back to
let erases = false, drawing = false, last = null, told = null;

const wipe = () => {
  pen.globalCompositeOperation = "source-over";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
};
const tell = () => {
  told = canvas.toDataURL("image/png");
  props.value = told;
  try { localStorage.setItem(KEPT, told); } catch { /* full, or forbidden: the drawing is on the page all the same */ }
  trigger("input");
};
const remember = () => {
  before.push(pen.getImageData(0, 0, canvas.width, canvas.height));
  if (before.length > UNDO) before.shift();
};
const show = (source, after) => {
  const picture = new Image();
  picture.onload = () => {
    wipe();
    const scale = Math.min(canvas.width / picture.width, canvas.height / picture.height);
    const [width, height] = [picture.width * scale, picture.height * scale];
    pen.drawImage(picture, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
    after?.();
  };
  picture.onerror = () => alert("this file is no picture that a browser shows");
  picture.src = source;
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
};
const draw = (to) => {
  const width = Number(element.querySelector(".pad-width").value);
  pen.strokeStyle = erases ? "#fff" : "#000";
  pen.lineWidth = erases ? 4 * width : width;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(...to);
  pen.stroke();
  last = to;
};

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  canvas.focus(); // its keys are the pad's
  remember();
  drawing = true;
  last = place(event);
  draw([last[0] + 0.01, last[1]]); // a dot
});
canvas.addEventListener("pointermove", (event) => {
  if (drawing) for (const own of event.getCoalescedEvents?.() ?? [event]) draw(place(own));
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (!drawing) return;
    drawing = false;
    tell();
  });
}
element.querySelector(".pad-eraser").addEventListener("click", (event) => {
  erases = !erases;
  event.currentTarget.setAttribute("aria-pressed", String(erases));
});
const undo = () => {
  if (!before.length) return;
  pen.putImageData(before.pop(), 0, 0);
  tell();
};
element.querySelector(".pad-undo").addEventListener("click", undo);
element.addEventListener("keydown", (event) => {
  if (event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  undo();
});
element.querySelector(".pad-clear").addEventListener("click", () => {
  remember();
  wipe();
  tell();
});
element.querySelector("input[type=file]").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (!file) return;
  remember();
  const url = URL.createObjectURL(file);
  show(url, () => { URL.revokeObjectURL(url); tell(); });
  event.target.value = "";
});
watch("value", () => {
  if (props.value && props.value !== told) show(props.value);
});

wipe();
const kept = localStorage.getItem(KEPT);
if (kept) show(kept, () => { told = kept; props.value = kept; });
