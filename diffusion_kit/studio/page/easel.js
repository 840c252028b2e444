// A picture that is painted on. Its value is JSON: the picture as a data URL with the bytes that were given, and what is
// painted as a PNG that is opaque there. Strokes are a "region" of a picture; "either" that or, on an empty field, the
// picture itself; or always a "sketch", on which what is uploaded is drawn. The browser keeps the value: a page that is
// loaded again finds it.
const root = element.querySelector(".easel"), field = root.querySelector(".easel-field");
const sheet = root.querySelector(".easel-sheet"), hint = root.querySelector(".easel-hint");
const base = root.querySelector(".easel-picture"), top_ = root.querySelector(".easel-paint");
const below = base.getContext("2d"), paint = top_.getContext("2d", { willReadFrequently: true });
const { name, strokes } = root.dataset;
const SIDE = 1024, SKETCH = 512, UNDO = 20; // pixels of what is painted on; strokes to go back
const before = [];
let picture = "", sketch = false, erases = false, painting = false, last = null, told = "";

const store = (mode, act) => new Promise((done, fail) => {
  const opening = indexedDB.open("diffusion-kit", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("easels");
  opening.onerror = fail;
  opening.onsuccess = () => {
    const asked = act(opening.result.transaction("easels", mode).objectStore("easels"));
    [asked.onsuccess, asked.onerror] = [() => done(asked.result), fail];
    opening.result.close(); // when it has answered
  };
});
const keep = (value) => { // a browser that keeps nothing shows it all the same
  told = value;
  store("readwrite", (own) => (value ? own.put(value, name) : own.delete(name))).catch(() => {});
};
const fit = () => { // the sheet as large as the field lets it be
  const scale = Math.min(field.clientWidth / base.width, field.clientHeight / base.height) || 1;
  sheet.style.width = `${base.width * scale}px`;
  sheet.style.height = `${base.height * scale}px`;
};
const open = (width, height) => {
  for (const own of [base, top_]) [own.width, own.height] = [width, height];
  before.length = 0;
  sheet.hidden = false;
  hint.hidden = !sketch;
  top_.classList.toggle("sketch", sketch);
  fit();
};
const blank = () => { // an empty field, on which a sketch may be drawn
  [picture, sketch] = ["", strokes !== "region"];
  if (sketch) return open(SKETCH, SKETCH);
  sheet.hidden = true;
  hint.hidden = false;
};
const painted = () => paint.getImageData(0, 0, top_.width, top_.height).data.some((value, k) => k % 4 === 3 && value > 0);
const sketched = () => { // black on white
  below.fillStyle = "#fff";
  below.fillRect(0, 0, base.width, base.height);
  below.drawImage(top_, 0, 0);
  const found = base.toDataURL("image/png");
  below.clearRect(0, 0, base.width, base.height);
  return found;
};
const tell = () => {
  const any = !sheet.hidden && painted();
  const own = sketch ? { picture: any ? sketched() : "", mask: "" } : { picture, mask: any ? top_.toDataURL("image/png") : "" };
  keep(own.picture ? JSON.stringify(own) : "");
  props.value = told;
  trigger("input");
};
const load = (source, done) => {
  const own = new Image();
  own.onload = () => done(own);
  own.onerror = () => alert("this file is no picture that a browser shows");
  own.src = source;
};
const trace = (own) => { // as a part of the sketch
  const scale = Math.min(top_.width / own.naturalWidth, top_.height / own.naturalHeight);
  const [width, height] = [own.naturalWidth * scale, own.naturalHeight * scale];
  remember();
  hint.hidden = true;
  paint.globalCompositeOperation = "source-over";
  paint.clearRect(0, 0, top_.width, top_.height);
  paint.drawImage(own, (top_.width - width) / 2, (top_.height - height) / 2, width, height);
};
const show = (source, mask, after) => load(source, (own) => {
  if (strokes === "sketch") trace(own);
  else {
    const scale = Math.min(1, SIDE / Math.max(own.naturalWidth, own.naturalHeight));
    [picture, sketch] = [source, false];
    open(Math.max(1, Math.round(own.naturalWidth * scale)), Math.max(1, Math.round(own.naturalHeight * scale)));
    below.drawImage(own, 0, 0, base.width, base.height);
    if (mask) load(mask, (layer) => paint.drawImage(layer, 0, 0, top_.width, top_.height));
  }
  after?.();
});
const take = (file) => {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => show(reader.result, "", tell);
  reader.readAsDataURL(file);
};
const remember = () => {
  before.push(paint.getImageData(0, 0, top_.width, top_.height));
  if (before.length > UNDO) before.shift();
};
const undo = () => {
  if (!before.length) return;
  paint.putImageData(before.pop(), 0, 0);
  tell();
};
const place = (event) => {
  const box = top_.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * top_.width, ((event.clientY - box.top) / box.height) * top_.height];
};
const draw = (to) => {
  const share = Number(root.querySelector(".easel-width").value) / (sketch ? 600 : 100);
  paint.globalCompositeOperation = erases ? "destination-out" : "source-over";
  paint.lineWidth = Math.max(1, (sketch && erases ? 4 : 1) * share * Math.min(top_.width, top_.height));
  paint.strokeStyle = sketch ? "#000" : "#e0245e";
  paint.lineCap = paint.lineJoin = "round";
  paint.beginPath();
  paint.moveTo(...last);
  paint.lineTo(...to);
  paint.stroke();
  last = to;
};

top_.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  top_.setPointerCapture(event.pointerId);
  top_.focus(); // its keys are the easel's
  hint.hidden = true;
  remember();
  painting = true;
  last = place(event);
  draw([last[0] + 0.01, last[1]]); // a dot
});
top_.addEventListener("pointermove", (event) => {
  if (painting) for (const own of event.getCoalescedEvents?.() ?? [event]) draw(place(own));
});
for (const end of ["pointerup", "pointercancel"]) {
  top_.addEventListener(end, () => {
    if (!painting) return;
    painting = false;
    tell();
  });
}
root.querySelector(".easel-eraser").addEventListener("click", (event) => {
  erases = !erases;
  event.currentTarget.setAttribute("aria-pressed", String(erases));
});
root.querySelector(".easel-undo").addEventListener("click", undo);
root.querySelector(".easel-clear").addEventListener("click", () => {
  if (sheet.hidden) return;
  remember();
  paint.clearRect(0, 0, top_.width, top_.height);
  tell();
});
root.querySelector(".easel-remove").addEventListener("click", () => { blank(); tell(); });
root.querySelector("input[type=file]").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
root.addEventListener("keydown", (event) => {
  if (event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  undo();
});
field.addEventListener("dragover", (event) => { event.preventDefault(); field.classList.add("over"); });
field.addEventListener("dragleave", () => field.classList.remove("over"));
field.addEventListener("drop", (event) => {
  event.preventDefault();
  field.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
root.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
new ResizeObserver(fit).observe(field);
const restore = (value) => {
  keep(value);
  const own = value ? JSON.parse(value) : { picture: "" };
  if (own.picture) show(own.picture, own.mask);
  else blank();
};
watch("value", () => {
  if ((props.value || "") !== told) restore(props.value || "");
});

blank();
if (props.value) restore(props.value); // it was given while this was not on the page
else store("readonly", (own) => own.get(name)).then((value) => {
  if (!value || props.value) return; // the studio was first
  restore(value);
  props.value = value; // without "input": nobody drew
}).catch(() => {});
