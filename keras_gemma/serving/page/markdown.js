// Text of a model, with the common Markdown, as DOM elements. Never as HTML source.

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE =
  /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*]+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

// Fills `container` with `text`. Replaces only blocks that changed since the last call, so that a
// selection survives while an answer grows.
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text);
  blocks.forEach((block, i) => {
    const source = JSON.stringify(block);
    const old = container.children[i];
    if (old?.source === source) return;
    const element = BUILDERS[block.kind](block);
    element.source = source;
    if (old) old.replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function splitBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let i = 0;
  const takeWhile = (test) => {
    const start = i;
    while (i < lines.length && test(lines[i], i > start)) i++;
    return lines.slice(start, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      i++;
    } else if (fence) {
      i++;
      const indent = /^\s*/.exec(line)[0].length;
      const isEnd = (other) => other.trim().startsWith(fence[1]) && !/[^`~\s]/.test(other);
      const code = takeWhile((other) => !isEnd(other));
      i++;
      const unindent = new RegExp(`^\\s{0,${indent}}`);
      const body = code.map((other) => other.replace(unindent, "")).join("\n");
      blocks.push({ kind: "code", language: fence[2], text: body });
    } else if (heading) {
      i++;
      blocks.push({ kind: "heading", level: heading[1].length, text: heading[2] });
    } else if (RULE.test(line)) {
      i++;
      blocks.push({ kind: "rule" });
    } else if (line.startsWith(">")) {
      const quoted = takeWhile((other) => other.startsWith(">"));
      blocks.push({ kind: "quote", text: quoted.map((q) => q.replace(/^> ?/, "")).join("\n") });
    } else if (line.includes("|") && TABLE_RULE.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      blocks.push({ kind: "table", lines: takeWhile((other) => other.includes("|")) });
    } else if (ITEM.test(line)) {
      const isPart = (other, isLater) =>
        ITEM.test(other) || (isLater && other.trim() && !startsBlock(other)) ||
        (isLater && !other.trim() && ITEM.test(lines[i + 1] ?? ""));
      blocks.push({ kind: "list", lines: takeWhile(isPart).filter((other) => other.trim()) });
    } else {
      const isPart = (other, isLater) =>
        other.trim() && !(isLater && (startsBlock(other) || ITEM.test(other)));
      blocks.push({ kind: "paragraph", text: takeWhile(isPart).join("\n") });
    }
  }
  return blocks;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || line.startsWith(">");
}

const BUILDERS = {
  code: ({ language, text }) => {
    const copy = element("button", "copy", "Copy");
    copy.type = "button";
    copy.dataset.action = "copy-code";
    const head = element("div", "code-head", element("span", "", language || "text"), copy);
    const pre = element("pre", "", element("code", "", text));
    pre.tabIndex = 0;
    return element("div", "code", head, pre);
  },
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, "", ...inline(text)),
  rule: () => element("hr"),
  quote: ({ text }) => element("blockquote", "", ...inline(text)),
  table: ({ lines: [head, , ...rows] }) => {
    const row = (line, tag) => {
      const cells = line.trim().replace(/^\||\|$/g, "").split("|");
      return element("tr", "", ...cells.map((cell) => element(tag, "", ...inline(cell.trim()))));
    };
    const body = element("tbody", "", ...rows.map((line) => row(line, "td")));
    return element("div", "table", element("table", "", element("thead", "", row(head, "th")), body));
  },
  list: ({ lines }) => list(lines),
  paragraph: ({ text }) => element("p", "", ...inline(text)),
};

// Returns a list of the lines, with a nested list for lines that are indented more.
function list(lines) {
  const [, indent, marker] = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(marker);
  const node = element(isOrdered ? "ol" : "ul");
  if (isOrdered) node.start = parseInt(marker, 10);
  let i = 0;
  while (i < lines.length) {
    let text = ITEM.exec(lines[i++])?.[3] ?? lines[i - 1];
    const nested = [];
    while (i < lines.length) {
      const match = ITEM.exec(lines[i]);
      if (match && match[1].length <= indent.length) break;
      if (match || nested.length) nested.push(lines[i]);
      else text += "\n" + lines[i].trim();
      i++;
    }
    const item = element("li", "", ...inline(text));
    if (nested.length) item.append(list(nested));
    node.append(item);
  }
  return node;
}

function inline(text) {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    const [, , code, bold, italic, words, url] = match;
    nodes.push(text.slice(0, match.index));
    if (code !== undefined) nodes.push(element("code", "", code));
    else if (bold !== undefined) nodes.push(element("strong", "", ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", "", ...inline(italic)));
    else nodes.push(link(words, url));
  }
  nodes.push(text);
  return nodes;
}

function link(words, url) {
  const anchor = element("a", "", words);
  anchor.href = url;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer";
  return anchor;
}
