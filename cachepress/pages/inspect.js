"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const KINDS = {
  context: "",
  template: ", of the chat template",
  special: ", a special token",
  question: ", of the question",
};
const CONTEXT = document.getElementById("context");
const TIP = document.getElementById("tip");
const LAYER = document.getElementById("layer");
const HEAD = document.getElementById("head");
const STATUS = document.getElementById("status");
const SPANS = [];
let counts = [];
let heads = 0;

function bitsOf(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

DATA.layers.forEach((layer) => {
  layer.masks = layer.heads.map(bitsOf);
});

function chosenMasks() {
  const layers = LAYER.value === "" ? DATA.layers : [DATA.layers[Number(LAYER.value)]];
  return layers.flatMap(({ masks }) =>
    (HEAD.value === "" ? masks : masks.slice(Number(HEAD.value), Number(HEAD.value) + 1)));
}

function count(masks) {
  const found = new Uint32Array(DATA.texts.length);
  masks.forEach((mask) => {
    for (let i = 0; i < found.length; i += 1) found[i] += (mask[i >> 3] >> (i & 7)) & 1;
  });
  return found;
}

/* A character can be of several tokens: they share a span, and all but the first have no text. */
function groups() {
  const found = [];
  DATA.texts.forEach((text, i) => {
    if (text === "" && found.length) found[found.length - 1].push(i);
    else found.push([i]);
  });
  return found;
}

function spanOf(tokens, number) {
  const [first] = tokens;
  const span = document.createElement("span");
  span.textContent = DATA.texts[first];
  span.dataset.group = String(number);
  if (DATA.zones[first] !== "context") span.classList.add(DATA.zones[first]);
  if (DATA.texts[first].includes("\n")) span.classList.add("line");
  return { span, tokens };
}

function write() {
  const all = document.createDocumentFragment();
  groups().forEach((tokens, number) => {
    SPANS.push(spanOf(tokens, number));
    all.append(DATA.gaps[tokens[0]] ?? "", SPANS[number].span);
  });
  all.append(DATA.rest);
  CONTEXT.replaceChildren(all);
}

function shareOf(tokens) {
  const held = tokens.reduce((sum, i) => sum + counts[i], 0);
  return heads ? held / (heads * tokens.length) : 0;
}

function shade() {
  const masks = chosenMasks();
  counts = count(masks);
  heads = masks.length;
  SPANS.forEach(({ span, tokens }) => {
    const share = shareOf(tokens);
    span.style.setProperty("--share", String(share));
    span.classList.toggle("none", share === 0);
  });
  const dropped = counts.filter((n) => n === 0).length;
  const held = counts.reduce((sum, n) => sum + n, 0) / Math.max(1, heads * counts.length);
  STATUS.textContent = `${heads} ${heads === 1 ? "head keeps" : "heads keep"} `
    + `${(100 * held).toFixed(1)} % of ${counts.length} tokens; ${dropped} evicted by all of them`;
  document.querySelectorAll("button[data-layer]").forEach((button) =>
    button.setAttribute("aria-pressed", String(button.dataset.layer === LAYER.value)));
}

function tipOf({ tokens }) {
  const [first] = tokens;
  const text = DATA.texts[first].replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const of = `of ${heads} ${heads === 1 ? "head" : "heads"}`;
  const lines = tokens.map((i) =>
    `token ${i}: kept by ${counts[i]} ${of} (${(100 * shareOf([i])).toFixed(0)} %)`);
  return [`“${text}”${KINDS[DATA.zones[first]]}`, ...lines].join("\n");
}

function tell(event) {
  const group = event.target.dataset?.group;
  TIP.hidden = group === undefined;
  if (TIP.hidden) return;
  TIP.textContent = tipOf(SPANS[Number(group)]);
  const { width, height } = TIP.getBoundingClientRect();
  const below = event.clientY + 18 + height < innerHeight;
  TIP.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4))}px`;
  TIP.style.top = `${below ? event.clientY + 18 : event.clientY - height - 10}px`;
}

function hide() {
  TIP.hidden = true;
}

write();
shade();
LAYER.addEventListener("change", shade);
HEAD.addEventListener("change", shade);
CONTEXT.addEventListener("pointerover", tell);
CONTEXT.addEventListener("pointerleave", hide);
addEventListener("scroll", hide, { passive: true });
document.querySelectorAll("button[data-layer]").forEach((button) => {
  button.addEventListener("click", () => {
    LAYER.value = LAYER.value === button.dataset.layer ? "" : button.dataset.layer;
    shade();
  });
});
