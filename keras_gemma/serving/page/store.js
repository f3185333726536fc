// Conversations and settings in the browser's storage. Knows nothing about the page.
//
// Each conversation has an entry of its own, so that two tabs do not overwrite each other's.

const PREFIX = "keras_gemma.conversation.";
const SETTINGS = "keras_gemma.settings";
const KEY = "keras_gemma.api_key";

export function newConversation(system = "") {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", system, updated: Date.now(), messages: [] };
}

// Returns all conversations, the latest first.
export function loadConversations() {
  const conversations = [];
  for (const name of Object.keys(localStorage)) {
    const value = name.startsWith(PREFIX) ? parse(localStorage.getItem(name)) : null;
    if (value && Array.isArray(value.messages)) conversations.push(value);
  }
  return conversations.sort((a, b) => b.updated - a.updated);
}

export function loadConversation(id) {
  return parse(localStorage.getItem(PREFIX + id));
}

// Throws a QuotaExceededError if the storage is full.
export function saveConversation(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function removeConversation(id) {
  localStorage.removeItem(PREFIX + id);
}

export function isConversationEntry(name) {
  return name === null || name.startsWith(PREFIX);
}

export function loadSettings() {
  return parse(localStorage.getItem(SETTINGS)) ?? {};
}

export function saveSettings(settings) {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
