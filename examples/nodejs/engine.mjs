// A workflow engine in Node.js (18 or newer, without any package): it asks for a decision before each run.
//
//     node engine.mjs ORGANIZATION RUN CREDITS

const { API_URL, LEDGER_TOKEN } = process.env;
const TRIES = 5;

// Sends a message of the ledger, and returns what the ledger did. Sending it again is always safe, so it does that as
// long as there is no answer: after 202, 429 and 503, and after a connection that broke.
async function send(orgId, runId, message, fields) {
  const path = [orgId, "workflows", runId, message].map(encodeURIComponent).join("/");
  let problem;
  for (let attempt = 1; attempt <= TRIES; attempt++) {
    try {
      const response = await fetch(`${API_URL}/api/organizations/${path}`, {
        method: "POST",
        headers: { Authorization: `Bearer ${LEDGER_TOKEN}`, "Content-Type": "application/json", Prefer: "wait=10" },
        body: JSON.stringify(fields),
      });
      const answer = await response.json();
      if (response.status === 200) return answer;
      if (![202, 429, 503].includes(response.status)) throw new Refused(answer.detail);
      problem = answer.detail ?? "no answer yet";
    } catch (error) {
      if (error instanceof Refused) throw error;
      problem = error.message;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * attempt));
  }
  throw new Error(`the ledger did not answer: ${problem}`);
}

class Refused extends Error {}

// The work itself. Returns the credits that it used.
async function work(credits) {
  return Math.ceil(credits * 0.9);
}

const [orgId, runId, credits] = process.argv.slice(2);
const decision = await send(orgId, runId, "start", { credits: Number(credits), activity_name: "import" });
if (decision.state === "reserved") {
  let used;
  try {
    used = await work(Number(credits));
  } catch (error) {
    await send(orgId, runId, "fail", { reason: error.message });
    throw error;
  }
  const ended = await send(orgId, runId, "finish", { credits: used });
  console.log(`${runId} used ${used}; ${ended.available} available`);
} else {
  console.log(`${runId} does not run: ${decision.reason ?? decision.state}`);
  process.exitCode = 1;
}
