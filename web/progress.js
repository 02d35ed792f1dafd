/** What pages of every interface show of a training run: its state in words, its times and its curves. Nothing here needs ComfyUI. */

import { drawChart, short } from "./chart.js"
import { say, saySentence } from "./words.js"

// The server's names of phases
export const WAITING = "waiting", STEPPING = "training", SAMPLING = "samples", DONE = "done", STOPPED = "stopped", FAILED = "failed"
export const TRAINING = new Set([STEPPING, SAMPLING]), ENDED = new Set([DONE, STOPPED, FAILED, undefined])
const VERDICTS = { "the same person": "good", perhaps: "doubtful", "someone else": "rejected", "no face": "rejected" }

export const svg = () => document.createElementNS("http://www.w3.org/2000/svg", "svg")

/** [120, 250] -> "2 to 4 min" */
export function spanText([least, most]) {
  const unit = most < 90 ? 1 : most < 5400 ? 60 : 3600
  const [low, high] = [least, most].map((seconds) => Number((seconds / unit).toFixed(unit === 3600 ? 1 : 0)))
  const number = low === high ? `${high}` : say("{} to {}", low, high)
  return { 1: say("{} s", number), 60: say("{} min", number), 3600: say("{} h", number) }[unit]
}

/** 75 -> "1 min 15 s" */
export function duration(seconds) {
  const whole = Math.round(seconds)
  if (whole < 60) return say("{} s", whole)
  if (whole < 3600) return say("{} min {} s", Math.floor(whole / 60), whole % 60)
  return say("{} h {} min", Math.floor(whole / 3600), Math.floor((whole % 3600) / 60))
}

export function statusText(state) {
  if (state.stopping && state.phase === STEPPING) return say("stopping after step {}", state.step ?? 1)
  if (state.phase === DONE) {
    const more = state.ended ? "" : say("the rest of the workflow is running")
    return [say("done: {}", state.file), verdictText(state), more].filter(Boolean).join(" · ")
  }
  if (state.phase === FAILED) return say("failed: {}", saySentence(state.error))
  if (state.phase === WAITING) return say("waiting, runs ahead in the queue: {}", state.ahead)
  if (state.phase === STOPPED) return say("stopped. Run it again to continue")
  const counted = () => say("{}: {} of {}", say(state.phase), state.done, state.total)
  if (!TRAINING.has(state.phase)) return state.total ? counted() : say(state.phase)
  const parts = []
  const sampling = state.phase === SAMPLING
  if ("step" in state) parts.push(say("step {} of {}", state.step, state.steps), say("loss {}", short(state.loss)))
  if ("step" in state && !sampling) parts.push(say("learning rate {}", short(state.learning_rate)))
  if (state.likeness != null) parts.push(say("likeness {}: {}", state.likeness.toFixed(2), say(state.likeness_word)))
  const share = Math.round((100 * state.done) / state.total)
  if (sampling) parts.push(state.stopping ? say("drawing the last samples: {} %", share) : say("drawing samples: {} %", share))
  return parts.join(" · ")
}

/** The meaning of the kept step's likeness, and what would improve it, unless the user has chosen another step. */
function verdictText({ kept_step, kept_likeness, kept_word, chosen }) {
  if (kept_likeness == null) return ""
  const verdict = say("step {}, likeness {}: {}", kept_step, kept_likeness.toFixed(2), say(kept_word))
  return chosen || !VERDICTS[kept_word] || VERDICTS[kept_word] === "good" ? verdict : say("{}. Train longer, or add more photos", verdict)
}

/** The verdict on a finished training run: good, doubtful or rejected; "" if likeness was not measured. */
export const verdictOf = ({ phase, kept_word }) => (phase === DONE && VERDICTS[kept_word]) || ""

/** The time passed and the time left, `since` seconds after the server sent the state. */
export function timeText(state, since = 0) {
  const parts = state.seconds == null ? [] : [duration(state.seconds + since)]
  if (TRAINING.has(state.phase) && state.seconds_left != null && !state.stopping)
    parts.push(say("{} left", duration(Math.max(0, state.seconds_left - since))))
  return parts.join(" · ")
}

export function doneShare(state) {
  if (state.phase === DONE) return 1
  const [done, total] = "step" in state ? [state.step, state.steps] : [state.done, state.total]
  return total ? done / total : 0
}

/** Draws the curves of a state: loss and learning rate, and likeness. Charts without a curve are hidden. */
export function drawCurves({ phase, steps, history, learning_rates, likenesses, limits }, loss, likeness) {
  const reached = Math.max(...[history, likenesses].map((points) => points?.at(-1)?.[0] ?? 0))
  const last = phase === DONE ? reached : steps ?? reached // it may have ended early
  loss.hidden = !history?.length
  likeness.hidden = !likenesses?.length
  if (!loss.hidden)
    drawChart(loss.firstChild, [
      { name: "loss", points: history, colour: "#3b82f6" },
      { name: "learning rate", points: learning_rates ?? [], colour: "#d97706" },
    ], last)
  if (!likeness.hidden)
    drawChart(likeness.firstChild, [{ name: "likeness", points: likenesses, colour: "#10b981" }], last)
  const [someoneElse, samePerson] = limits ?? []
  likeness.title =
    samePerson ? say("{} or more: the same person. Below {}: someone else", samePerson, someoneElse) : ""
}
