// Asks for the page again while something goes on, replaces the parts that differ, and sends forms without leaving.
"use strict";

const known = new Map(); // HTML of each part, as it came
let stamp = "";
let shown = location.pathname + location.search;
let timer = 0;
let asked = 0; // a late answer to an earlier question is not shown

function parts(root) {
  return [...root.querySelectorAll("[data-part]")];
}

function draw(part) {
  const figure = JSON.parse(part.querySelector("script").textContent);
  let plot = part.querySelector(".plot");
  if (!plot) {
    plot = part.appendChild(document.createElement("div"));
    plot.className = "plot";
  }
  part.style.minHeight = `${figure.layout.height}px`;
  const narrow = part.clientWidth < 480;
  if (narrow) figure.layout.margin = { ...figure.layout.margin, l: 48, r: 8 };
  Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  if (plot.dataset.heard) return;
  plot.dataset.heard = "yes";
  plot.on("plotly_click", (event) => {
    const proxy = event.points.map((point) => point.id).find(Boolean);
    const run = document.body.dataset.run;
    if (proxy && run) visit(`${run}/proxies/${proxy}#candidate`);
  });
}

function settle(part) {
  if (part.classList.contains("figure")) draw(part);
  if ("bottom" in part.dataset) part.scrollTop = part.scrollHeight;
}

function show(page, moved) {
  const fresh = new DOMParser().parseFromString(page, "text/html");
  document.title = fresh.title;
  document.body.className = fresh.body.className;
  Object.assign(document.body.dataset, fresh.body.dataset);
  const names = (root) => parts(root).map((part) => part.id).join();
  const same = !moved && names(document.querySelector("main")) === names(fresh.querySelector("main"));
  const texts = new Map(parts(fresh).map((part) => [part.id, part.outerHTML]));
  const scrolled = new Map(parts(document).map((part) => [part.id, part.scrollTop]));
  if (!same) document.querySelector("main").replaceWith(fresh.querySelector("main"));
  for (const [name, text] of texts) {
    const part = document.getElementById(name);
    if (!same && part.closest("main")) {
      part.scrollTop = scrolled.get(name) ?? 0;
      settle(part);
    } else if (known.get(name) !== text) {
      const next = fresh.getElementById(name);
      if (part.classList.contains("figure")) {
        part.querySelector("script").textContent = next.querySelector("script").textContent;
        draw(part);
      } else {
        part.replaceWith(next);
        next.scrollTop = scrolled.get(name);
        settle(next);
      }
    }
    known.set(name, text);
  }
}

async function ask(again) {
  clearTimeout(timer);
  const turn = ++asked;
  const address = location.pathname + location.search;
  try {
    if (!document.hidden) {
      const answer = await fetch(address, { headers: again && stamp ? { "If-None-Match": stamp } : {} });
      const page = await answer.text();
      if (turn !== asked) return;
      document.body.classList.remove("lost");
      if (answer.status !== 304) {
        show(page, address !== shown);
        shown = address;
        stamp = answer.headers.get("ETag");
      }
    }
  } catch {
    if (turn !== asked) return;
    document.body.classList.add("lost");
  }
  timer = setTimeout(ask, Number(document.body.dataset.every), true);
}

async function visit(address) {
  const url = new URL(address, location.href);
  history.pushState(null, "", url);
  notice("");
  await ask(false);
  arrive();
}

function arrive() {
  const target = location.hash && document.querySelector(location.hash);
  if (target) target.scrollIntoView({ behavior: "smooth" });
  else scrollTo(0, 0);
}

function notice(text) {
  const place = document.getElementById("notice");
  place.textContent = text;
  place.hidden = !text;
}

async function send(form, button) {
  const fields = new URLSearchParams(new FormData(form, button));
  const buttons = [...form.querySelectorAll("button")].filter((each) => !each.disabled);
  buttons.forEach((each) => (each.disabled = true));
  try {
    const answer = await fetch(form.getAttribute("action"), { method: "POST", body: fields });
    if (!answer.ok) return notice((await answer.text()) || `The page answered with ${answer.status}.`);
    notice("");
    if ("clear" in form.dataset) form.reset();
    const place = answer.headers.get("Location");
    await (place ? visit(place) : ask(true));
  } catch {
    document.body.classList.add("lost");
  } finally {
    buttons.forEach((each) => (each.disabled = false));
  }
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target, event.submitter);
});

document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.metaKey || event.ctrlKey || event.shiftKey) return;
  const place = event.target.closest("a[href], tr[data-href]");
  if (!place || place.target || place.hasAttribute("download")) return;
  event.preventDefault();
  visit(place.dataset.href || place.href);
});

document.addEventListener("change", (event) => {
  if ("visit" in event.target.dataset) visit(event.target.value);
});

document.addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form.say");
  if (!form || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

addEventListener("popstate", async () => {
  await ask(false);
  arrive();
});
addEventListener("resize", () => {
  for (const part of document.querySelectorAll("[data-bottom]")) part.scrollTop = part.scrollHeight;
});
document.addEventListener("visibilitychange", () => document.hidden || ask(true));

for (const part of parts(document)) {
  known.set(part.id, part.outerHTML);
}
parts(document).forEach(settle);
timer = setTimeout(ask, Number(document.body.dataset.every), true);
