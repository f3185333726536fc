// The chat page: draws the conversations, and reacts to the keyboard and the mouse.

import { ServerError, listModels, streamChat } from "./api.js";
import { element, renderMarkdown } from "./markdown.js";
import * as store from "./store.js";

const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const TITLE_LENGTH = 60;
const SAVE_SECONDS = 2;

const $ = (id) => document.getElementById(id);
const page = Object.fromEntries(
  ["sidebar", "backdrop", "conversations", "model", "scroll", "notice", "log", "composer", "prompt",
    "send", "stop", "toast", "announcement", "settings", "to-end", "open-sidebar"]
    .map((id) => [id, $(id)]),
);
const form = page.settings.querySelector("form");
const narrow = matchMedia("(max-width: 760px)");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

let settings = store.loadSettings();
let conversations = store.loadConversations();
let current = conversations[0] ?? store.newConversation();
const running = new Map(); // id of a conversation -> {controller, conversation}
const removed = new Set(); // ids of conversations

// --- Answers ---------------------------------------------------------------------------------

function send(text) {
  current.messages.push({ role: "user", content: text });
  current.title ||= text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  return answer(current);
}

async function answer(conversation) {
  if (running.has(conversation.id)) return;
  const controller = new AbortController();
  running.set(conversation.id, { controller, conversation });
  const body = requestBody(conversation);
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  keep(conversation);
  draw();
  scrollToEnd();
  try {
    await receive(body, conversation, message, controller.signal);
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped";
    else message.error = describe(error);
  } finally {
    running.delete(conversation.id);
    keep(conversation);
    if (conversation.id === current.id) draw();
    else drawSidebar();
    const { error } = message;
    announce(error ? `Error: ${error.message} ${error.remedy}` : `Answer: ${message.content}`);
  }
}

function requestBody(conversation) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const turns = conversation.messages
    .filter((message) => message.content)
    .map(({ role, content }) => ({ role, content }));
  const sampling = SAMPLING.filter((name) => settings[name] !== undefined)
    .map((name) => [name, settings[name]]);
  return { model: page.model.value, messages: [...system, ...turns], ...Object.fromEntries(sampling) };
}

async function receive(body, conversation, message, signal) {
  const start = performance.now();
  let first = 0;
  let last = start;
  let saved = start;
  let parts = 0;
  let usage;
  for await (const part of streamChat(body, store.apiKey(), signal)) {
    const now = performance.now();
    if (part.text) {
      first ||= now;
      last = now;
      parts++;
      message.content += part.text;
      drawSoon(conversation, message);
    }
    if (part.finishReason === "length") message.note = "Stopped at the maximum of tokens";
    usage = part.usage ?? usage;
    if (now - saved > SAVE_SECONDS * 1000) {
      keep(conversation);
      saved = now;
    }
  }
  if (usage && first) {
    const seconds = (last - first) / 1000;
    const tokens = usage.completion_tokens;
    message.stats = { tokens, first: (first - start) / 1000 };
    // A server may send several tokens at once, so that two parts say little about the speed.
    if (parts > 2 && seconds > 0) message.stats.speed = (tokens - 1) / seconds;
  }
}

function describe(error) {
  if (error instanceof ServerError) {
    return { message: error.message, remedy: error.remedy, isAboutKey: error.isAboutKey };
  }
  console.error(error);
  return { message: "The answer could not be read.", remedy: `Try again. (${error.message})` };
}

function regenerate() {
  if (current.messages.at(-1)?.role === "assistant") current.messages.pop();
  return answer(current);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

// --- Drawing ---------------------------------------------------------------------------------

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function iconButton(name, label, onClick) {
  const button = element("button", "icon small", icon(name));
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => onClick(button));
  return button;
}

function textButton(label, onClick, className = "") {
  const button = element("button", className, label);
  button.type = "button";
  button.addEventListener("click", onClick);
  return button;
}

function draw() {
  drawSidebar();
  drawLog();
  const isRunning = running.has(current.id);
  // The focus moves to the button that replaces the one that had it.
  const hadFocus = [page.send, page.stop].includes(document.activeElement);
  page.send.hidden = isRunning;
  page.stop.hidden = !isRunning;
  if (hadFocus) (isRunning ? page.stop : page.prompt).focus();
  page.log.setAttribute("aria-busy", String(isRunning));
  $("export").disabled = !current.messages.length;
  document.title = current.title ? `${current.title} · keras_gemma` : "keras_gemma";
}

function drawLog() {
  const nodes = current.messages.map((message, i) => messageNode(message, i));
  if (current.system) nodes.unshift(systemNode());
  if (!current.messages.length) nodes.push(welcome());
  page.log.replaceChildren(...nodes);
  fitToEnd();
}

function welcome() {
  const model = page.model.value;
  const title = element("h1", "", model ? `Chat with ${model}` : "Chat");
  return element("div", "welcome", title, element("p", "", "Write a message to begin."));
}

function systemNode() {
  const label = element("span", "label", "System prompt");
  const button = textButton("", openSettings, "system");
  button.append(label, element("span", "text", current.system));
  button.title = "Edit the system prompt";
  return button;
}

function messageNode(message, i) {
  const isUser = message.role === "user";
  const isLast = i === current.messages.length - 1;
  const isOpen = isLast && !isUser && running.has(current.id);
  const node = element("article", `message ${message.role}`);
  node.setAttribute("aria-label", isUser ? "Your message" : "Answer");
  const content = element("div", "content");
  if (isUser) content.textContent = message.content;
  else renderMarkdown(content, message.content);
  if (isOpen && !message.content) content.append(waiting());
  if (message.content || isOpen) node.append(content);
  if (message.error) node.append(errorNode(message.error, isLast ? regenerate : null));
  if (!isOpen) node.append(actions(message, i, isLast));
  return node;
}

function waiting() {
  const dots = element("span", "waiting", element("i"), element("i"), element("i"));
  dots.setAttribute("role", "img");
  dots.setAttribute("aria-label", "Waiting for the answer");
  return dots;
}

function errorNode({ message, remedy, isAboutKey }, retry) {
  const node = element("div", "error", element("strong", "", message), element("p", "", remedy));
  const buttons = element("div", "buttons");
  if (isAboutKey) buttons.append(textButton("Open settings", openSettings));
  if (retry) buttons.append(textButton("Try again", retry));
  if (buttons.children.length) node.append(buttons);
  return node;
}

function actions(message, i, isLast) {
  const node = element("div", "actions");
  if (message.content) {
    node.append(iconButton("copy", "Copy", (button) => copy(message.content, button)));
    if (!running.has(current.id)) node.append(iconButton("edit", "Edit", () => edit(message, i)));
  }
  const isAnswer = message.role === "assistant";
  if (isLast && isAnswer && !message.error) {
    node.append(iconButton("again", "Regenerate", regenerate));
  }
  if (isLast && !isAnswer && !running.has(current.id)) {
    node.append(iconButton("again", "Answer this message", () => answer(current)));
  }
  const facts = [message.note, ...statistics(message.stats)].filter(Boolean);
  if (facts.length) node.append(element("span", "stats", facts.join(" · ")));
  return node;
}

function statistics(stats) {
  if (!stats) return [];
  const speed = stats.speed && `${stats.speed.toFixed(stats.speed < 10 ? 2 : 1)} tokens/s`;
  return [`${stats.tokens} tokens`, speed, `first after ${stats.first.toFixed(2)} s`];
}

let nextFrame = 0;

// Draws the growing answer once a frame.
function drawSoon(conversation, message) {
  if (conversation.id !== current.id || nextFrame) return;
  nextFrame = requestAnimationFrame(() => {
    nextFrame = 0;
    const content = page.log.querySelector(".message.assistant:last-child > .content");
    if (conversation.id !== current.id || !running.has(current.id) || !content) return;
    content.querySelector(".waiting")?.remove();
    renderMarkdown(content, message.content);
    fitToEnd();
  });
}

function drawSidebar() {
  const nodes = conversations.map((conversation) => {
    const open = textButton(conversation.title || "New conversation", () => show(conversation), "open");
    open.title = conversation.title;
    const isCurrent = conversation.id === current.id;
    if (isCurrent) open.setAttribute("aria-current", "true");
    const node = element("li", isCurrent ? "current" : "", open);
    if (running.has(conversation.id)) node.append(element("span", "busy"));
    node.append(
      iconButton("edit", "Rename", () => rename(conversation, node)),
      iconButton("delete", "Delete", () => remove(conversation)),
    );
    return node;
  });
  page.conversations.replaceChildren(...nodes);
}

// --- Scrolling: follows the answer as long as the reader is at the end -----------------------

let follows = true;

function fitToEnd() {
  if (follows) page.scroll.scrollTop = page.scroll.scrollHeight;
  onScroll();
}

function scrollToEnd() {
  follows = true;
  fitToEnd();
}

function onScroll() {
  const { scrollTop, scrollHeight, clientHeight } = page.scroll;
  follows = scrollHeight - scrollTop - clientHeight < 40;
  page["to-end"].hidden = follows;
}

// --- Conversations ---------------------------------------------------------------------------

function keep(conversation) {
  if (removed.has(conversation.id)) return;
  conversation.updated = Date.now();
  conversations = [conversation, ...conversations.filter(({ id }) => id !== conversation.id)];
  try {
    store.saveConversation(conversation);
  } catch {
    toast("The storage of this browser is full: delete a conversation to keep this one.");
  }
}

function show(conversation) {
  current = conversation;
  closeSidebar();
  draw();
  scrollToEnd();
  page.prompt.focus();
}

function remove(conversation) {
  running.get(conversation.id)?.controller.abort();
  removed.add(conversation.id);
  store.removeConversation(conversation.id);
  conversations = conversations.filter(({ id }) => id !== conversation.id);
  if (current.id === conversation.id) current = conversations[0] ?? store.newConversation();
  draw();
  page.prompt.focus();
  toast(`Deleted “${conversation.title || "New conversation"}”.`, "Undo", () => {
    removed.delete(conversation.id);
    keep(conversation);
    show(conversation);
  });
}

function rename(conversation, node) {
  const input = element("input");
  input.value = conversation.title;
  input.setAttribute("aria-label", "Title");
  node.replaceChildren(input);
  input.select();
  let isDone = false;
  const finish = (title) => {
    if (isDone) return;
    isDone = true;
    if (title) {
      conversation.title = title.slice(0, 2 * TITLE_LENGTH);
      store.saveConversation(conversation);
    }
    draw();
  };
  input.addEventListener("blur", () => finish(input.value.trim()));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) finish(input.value.trim());
    if (event.key === "Escape") finish("");
  });
}

// A user message is sent again, without what followed it. An answer is only changed.
function edit(message, i) {
  const isUser = message.role === "user";
  const node = page.log.querySelectorAll(".message")[i];
  const area = element("textarea");
  area.rows = 1;
  area.value = message.content;
  area.setAttribute("aria-label", "Edit the message");
  const save = () => {
    const text = area.value.trim();
    if (!text) return cancel();
    if (isUser) {
      current.messages.length = i;
      send(text);
    } else {
      message.content = text;
      delete message.stats;
      keep(current);
      draw();
    }
    page.prompt.focus();
  };
  const cancel = () => {
    draw();
    page.prompt.focus();
  };
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (isSendKey(event)) {
      event.preventDefault();
      save();
    }
    if (event.key === "Escape") cancel();
  });
  const buttons = element("div", "buttons", textButton("Cancel", cancel),
    textButton(isUser ? "Send" : "Save", save, "primary"));
  node.classList.add("editing");
  node.replaceChildren(area, buttons);
  grow(area);
  area.focus();
}

function exportCurrent() {
  const { title, system, messages } = current;
  const turns = messages.map(({ role, content }) => ({ role, content }));
  const all = system ? [{ role: "system", content: system }, ...turns] : turns;
  const text = JSON.stringify({ title, model: page.model.value, settings, messages: all }, null, 2);
  const anchor = element("a");
  anchor.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  anchor.download = `${title.replace(/[^\p{L}\p{N}]+/gu, "_") || "conversation"}.json`;
  anchor.click();
  URL.revokeObjectURL(anchor.href);
}

// --- Settings, theme, model ------------------------------------------------------------------

function openSettings() {
  for (const name of SAMPLING) form.elements[name].value = settings[name] ?? "";
  form.elements.system.value = current.system;
  form.elements.key.value = store.apiKey();
  page.settings.returnValue = "";
  page.settings.showModal();
}

function onSettingsClosed() {
  if (page.settings.returnValue !== "save") return;
  const filled = SAMPLING.filter((name) => form.elements[name].value !== "");
  const { theme } = settings;
  settings = Object.fromEntries(filled.map((name) => [name, Number(form.elements[name].value)]));
  if (theme) settings.theme = theme;
  store.saveSettings(settings);
  current.system = form.elements.system.value.trim();
  if (current.messages.length) keep(current);
  store.setApiKey(form.elements.key.value.trim());
  draw();
  loadModels();
}

function applyTheme() {
  document.documentElement.dataset.theme = settings.theme ?? "system";
}

function switchTheme() {
  const isDark = settings.theme ? settings.theme === "dark" : prefersDark.matches;
  const theme = isDark ? "light" : "dark";
  const isThatOfTheSystem = (theme === "dark") === prefersDark.matches;
  if (isThatOfTheSystem) delete settings.theme;
  else settings.theme = theme;
  store.saveSettings(settings);
  applyTheme();
}

async function loadModels() {
  const chosen = page.model.value;
  try {
    const models = await listModels(store.apiKey());
    page.model.replaceChildren(...models.map((name) => element("option", "", name)));
    if (models.includes(chosen)) page.model.value = chosen;
    page.model.classList.toggle("single", models.length < 2);
    page.notice.replaceChildren();
    if (!current.messages.length) drawLog();
  } catch (error) {
    page.notice.replaceChildren(errorNode(describe(error), loadModels));
  }
}

// --- Small parts -----------------------------------------------------------------------------

let toastTimer = 0;

function toast(text, label, onClick) {
  page.toast.replaceChildren(element("span", "", text));
  const hide = () => page.toast.replaceChildren();
  if (label) {
    page.toast.append(textButton(label, () => {
      hide();
      onClick();
    }));
  }
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, 8000);
}

// Screen readers read an answer once it is complete.
function announce(text) {
  page.announcement.textContent = text;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers without a secure context have no clipboard.
    const area = element("textarea", "unseen", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = [...button.childNodes];
  button.replaceChildren(button.classList.contains("icon") ? icon("done") : "Copied");
  setTimeout(() => button.replaceChildren(...before), 1500);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function openSidebar() {
  document.body.classList.add("sidebar-open");
  updateSidebar();
  $("close-sidebar").focus();
}

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  updateSidebar();
}

// A closed list on a narrow screen takes no focus.
function updateSidebar() {
  const isOpen = document.body.classList.contains("sidebar-open");
  page.sidebar.inert = narrow.matches && !isOpen;
  page["open-sidebar"].setAttribute("aria-expanded", String(isOpen));
}

// --- Events ----------------------------------------------------------------------------------

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = page.prompt.value.trim();
  if (!text || running.has(current.id)) return;
  page.prompt.value = "";
  grow(page.prompt);
  send(text);
});
page.prompt.addEventListener("input", () => grow(page.prompt));
page.prompt.addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  page.composer.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || page.settings.open) return;
  if (document.body.classList.contains("sidebar-open")) closeSidebar();
  else stop();
});
page.stop.addEventListener("click", stop);
page.log.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action=copy-code]");
  if (button) copy(button.closest(".code").querySelector("code").textContent, button);
});
page.scroll.addEventListener("scroll", onScroll, { passive: true });
page["to-end"].addEventListener("click", scrollToEnd);
page["open-sidebar"].addEventListener("click", openSidebar);
page.backdrop.addEventListener("click", closeSidebar);
page.settings.addEventListener("close", onSettingsClosed);
$("close-sidebar").addEventListener("click", closeSidebar);
$("new").addEventListener("click", () => show(store.newConversation(current.system)));
$("export").addEventListener("click", exportCurrent);
$("theme").addEventListener("click", switchTheme);
$("open-settings").addEventListener("click", openSettings);
for (const id of ["close-settings", "cancel-settings"]) {
  $(id).addEventListener("click", () => page.settings.close());
}
narrow.addEventListener("change", updateSidebar);
addEventListener("resize", fitToEnd);
addEventListener("pagehide", () => {
  for (const { conversation } of running.values()) keep(conversation);
});
// Another tab has changed a conversation.
addEventListener("storage", (event) => {
  if (!store.isConversationEntry(event.key) || running.size) return;
  conversations = store.loadConversations();
  const isEmpty = !current.messages.length;
  current = store.loadConversation(current.id) ?? (isEmpty ? current : store.newConversation());
  draw();
});

applyTheme();
updateSidebar();
draw();
scrollToEnd();
loadModels();
if (!narrow.matches) page.prompt.focus();
