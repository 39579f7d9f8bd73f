// Who may see the store. The token of the address, which is good once, is exchanged for the secret that every request has.
// It is kept where only this page can read it: unlike a cookie, which goes to all ports of this machine.

const NAME = "mmcache-secret";
let secret = null;

function stored() {
  try {
    return localStorage.getItem(NAME);
  } catch {
    // The browser keeps nothing for pages: then this tab has it until it is loaded anew.
    return null;
  }
}

function store() {
  try {
    localStorage.setItem(NAME, secret);
  } catch {
    // As above.
  }
}

export function authorization() {
  const found = stored() ?? secret;
  return found ? { Authorization: `Bearer ${found}` } : {};
}

export async function enter() {
  const token = /^#token=([\w-]+)$/.exec(location.hash)?.[1];
  if (!token) return;
  // Out of the address and the history first.
  history.replaceState(null, "", location.pathname + location.search);
  const answer = await fetch("/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  // One that was used before, by this browser: it has the secret.
  if (!answer.ok) return;
  secret = (await answer.json()).secret;
  store();
}
