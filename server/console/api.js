// What is asked of the server. Addresses are relative to the page, so that it works behind a proxy's path too.

// The keys live here and nowhere else: not in the address, not in a cookie, not in any storage.
const keys = { user: "", admin: "" };

export function useKeys(user, admin) {
  keys.user = user;
  keys.admin = admin;
}

/** Why something was not done: `message` says what happened, `todo` what to do, `status` is HTTP's, 0 without one. */
export class Problem extends Error {
  constructor(message, todo = "", status = 0) {
    super(message);
    this.todo = todo;
    this.status = status;
  }
}

/** The response to a request that went well. Throws Problem, and AbortError when `signal` says so. */
export async function call(path, { body = null, admin = false, signal = null } = {}) {
  const key = admin ? keys.admin || keys.user : keys.user || keys.admin;
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw fromBrowser(error);
  }
  if (!response.ok) throw await fromServer(response);
  return response;
}

/** The JSON chunks of a stream of server-sent events, up to `[DONE]`. Throws Problem where it ends without. */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw fromBrowser(error);
    });
    if (done) throw new Problem("The answer broke off before its end.", "Is the server still running? Send it again.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice("data: ".length));
      if (chunk.error) throw new Problem(chunk.error.message);
      yield chunk;
    }
  }
}

function fromBrowser(error) {
  if (error.name === "AbortError") return error;
  return new Problem("The server cannot be reached.", "See whether it runs and what its log says, then try again.");
}

async function fromServer(response) {
  const { status, headers } = response;
  const message = (await response.json().catch(() => null))?.error?.message ?? `The server answered ${status}.`;
  if (status === 401) return new Problem("The server wants a key.", "Type a valid one under Keys, above.", status);
  if (status === 403) return new Problem(message, "Type another under Keys, above.", status);
  const wait = headers.get("retry-after");
  return new Problem(message, wait ? `It can be tried again in ${wait} s.` : "", status);
}
