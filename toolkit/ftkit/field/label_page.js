"use strict";
// One picture at a time; a key or a button labels it and goes to the next.
const KEYS = "123456789abcdefghijklmnopqrstuvwxyz";
const element = (id) => document.getElementById(id);
let classes = [];
let pictures = [];
let at = 0;
let busy = false; // a second key before the answer would label the same picture again

function show() {
  const picture = pictures[at];
  const done = pictures.filter((each) => each.label).length;
  element("place").textContent = `${at + 1} of ${pictures.length}, ${done} labelled`;
  element("picture").src = `/picture/${at}`;
  element("picture").alt = picture.path;
  const alike = picture.alike ? `, ${picture.alike} alike` : "";
  const said = `the model says ${picture.suggested} (${picture.probability.toFixed(2)})`;
  element("said").textContent = `${picture.why}${alike}; ${picture.suggested ? said : "no longer in the log"}`;
  element("classes").replaceChildren(
    ...classes.map((name, place) => {
      const button = document.createElement("button");
      const key = document.createElement("kbd");
      key.textContent = KEYS[place] || "";
      button.append(key, name);
      button.setAttribute("aria-pressed", String(name === picture.label));
      button.onclick = () => give(name);
      return button;
    }),
  );
}

async function give(label) {
  if (busy) return;
  busy = true;
  const number = at;
  const answer = await fetch("/label", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ number, path: pictures[number].path, label }),
  }).catch(() => null);
  busy = false;
  if (!answer || !answer.ok) {
    const why = answer && answer.status === 400 ? "Is it another review's page? Reload it." : "Is ftkit still running?";
    element("wrong").textContent = `This label was not written. ${why}`;
    return;
  }
  element("wrong").textContent = "";
  pictures[number].label = label;
  if (label && !classes.includes(label)) classes.push(label);
  if (label) move(1);
  else show();
}

function move(by) {
  at = Math.min(Math.max(at + by, 0), pictures.length - 1);
  show();
}

element("back").onclick = () => move(-1);
element("next").onclick = () => move(1);
element("clear").onclick = () => give("");
element("other").onsubmit = (event) => {
  event.preventDefault();
  const name = element("name").value.trim();
  element("name").value = "";
  element("name").blur();
  if (name) give(name);
};
document.onkeydown = (event) => {
  if (event.target === element("name") || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const place = KEYS.indexOf(event.key);
  if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === "Backspace") give("");
  else if (place >= 0 && place < classes.length) give(classes[place]);
};

fetch("/pictures.json")
  .then((answer) => answer.json())
  .then((told) => {
    ({ classes, pictures } = told);
    show();
  });
