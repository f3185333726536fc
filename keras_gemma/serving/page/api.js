// Requests to the server, in OpenAI's format. Knows nothing about the page.

// An error with the server's words, and what the reader can do about it.
export class ServerError extends Error {
  constructor(message, remedy, isAboutKey = false) {
    super(message);
    this.remedy = remedy;
    this.isAboutKey = isAboutKey;
  }
}

export async function listModels(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

// Yields the parts of an answer: {text}, {finishReason}, {usage}.
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isComplete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      isComplete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, "Try again.");
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finishReason: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!isComplete) throw new ServerError("The connection ended before the answer did.", "Try again.");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(
      "The server does not answer.",
      "Check that keras-gemma serve is running, then try again.",
    );
  }
  if (response.ok) return response;
  const text = await response.text();
  const { message, code } = errorOf(text);
  const remedy = remedyOf(response.status, code, response.headers.get("Retry-After"));
  const words = message || `The server answered with status ${response.status}.`;
  throw new ServerError(words, remedy, response.status === 401);
}

function errorOf(text) {
  try {
    return JSON.parse(text).error ?? {};
  } catch {
    return { message: text.slice(0, 500) };
  }
}

function remedyOf(status, code, retryAfter) {
  if (code === "context_length_exceeded") {
    return "Start a new conversation, shorten a message, or set a lower maximum of tokens.";
  }
  if (status === 401) return "Enter the API key of this server in the settings.";
  if (status === 404) return "Choose another model, then try again.";
  if (status === 413) return "Shorten the message, or start a new conversation.";
  if (status === 429) {
    return retryAfter
      ? `The server is busy. Try again in ${retryAfter} s.`
      : "The server is busy. Try again in a moment.";
  }
  if (status === 503) return "The server is starting or stopping. Try again in a moment.";
  if (status < 500) return "Check the settings and the message.";
  return "Try again. If it happens again, read the log of the server.";
}

// Yields the data of each server-sent event.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
