/** All training runs of the user, in the sidebar and from the panel of Train Face LoRA. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { choose, make, openDialog } from "./elements.js"
import { thumbnail } from "./thumbnails.js"
import { say, saySentence } from "./words.js"

const UNTRAINED = "untrained" // the phase of dropped photos without a training run
// say
const PHASES = { running: "training", drawing: "drawing headshots", stopped: "stopped", failed: "failed", done: "done" }
// say
const LOST = { restored: "{} is missing. Run restores it in seconds", trained: "{} is missing. Run trains it again",
  outdated: "{} was trained by an older version. Run trains it again" }
/** What Run does about a LoRA that it can't use. */
export const lostText = ({ lost, file }) => say(LOST[lost], file)
// say
const CONSENT = { agreed_by: "Who has agreed", agreed_for: "What for", agreed_until: "Until, ten years at most", withdrawn: "Withdrawn on" }
/** The event that tells the widgets the key and the new name of a training run. */
export const RENAMED = "facelora.renamed"
/** The event that tells the widgets the names of deleted files. */
export const DELETED = "facelora.deleted"

const VERDICTS = { "the same person": "good", perhaps: "doubtful", "someone else": "rejected", "no face": "rejected" }

/** The name of the LoRA, which has a number if another one has the person's name. */
const nameOf = ({ file, name }) => file?.replace(/\.safetensors$/, "") ?? name

const read = async (address, options) => (await api.fetchApi(address, options)).json()

const change = (address, values, method = "PATCH") =>
  read(address, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) })

/** Deletes dropped photos by their names, except those that a training run uses. Pages forget the deleted ones. */
export async function deletePhotos(names) {
  const { deleted } = await change("/facelora/photos", { names }, "DELETE")
  document.dispatchEvent(new CustomEvent(DELETED, { detail: deleted }))
}

/** Shows the list in an element. `leave` is called when a training run is opened. */
export async function listPeople(root, leave = () => {}) {
  const people = await read("/facelora/people")
  root.replaceChildren(...people.map((person) => row(person, root, leave)))
  if (!people.length) root.append(make("div", "facelora-quiet", say("No one has been trained yet.")))
}

/** Shows the list in an element, and again after each change, as long as the element is on the page. */
function keepListed(root) {
  const events = ["status", "facelora.training"]
  let phase, last = Promise.resolve()
  const list = () => {
    last = last.then(() => listPeople(root)).catch(() => {}) // ComfyUI shows that the server is gone
  }
  const refresh = ({ detail }) => {
    if (!root.isConnected) return events.forEach((event) => api.removeEventListener(event, refresh))
    if (!detail || (detail.phase && detail.phase === phase)) return // the connection is lost; one more step
    phase = detail.phase ?? phase
    list()
  }
  for (const event of events) api.addEventListener(event, refresh)
  list()
}

function row(person, root, leave) {
  const picture = Object.assign(make("img", ""), { alt: "" }) // the name is beside it
  if (person.phase === UNTRAINED) return untrained(person, picture, root, leave)
  if (person.picture) picture.src = person.picture
  const date = new Date(1000 * person.begun).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })
  const likeness = make("div", `facelora-says-${VERDICTS[person.likeness_word] ?? "nothing"}`)
  if (person.likeness != null) likeness.textContent = say("likeness {}: {}", person.likeness.toFixed(2), say(person.likeness_word))
  const facts = make("div", "facelora-facts", make("b", "", nameOf(person)), likeness,
    make("div", "facelora-quiet", `${person.lost ? lostText(person) : say(PHASES[person.phase])} · ${date}`))
  const open = make("button", "", say("Open"))
  open.disabled = !person.can_open
  if (open.disabled) open.title = say("This training run was queued without a workflow.")
  open.addEventListener("click", async () => {
    const graph = await read(`/facelora/people/${person.key}`)
    if (!graph) return // deleted elsewhere
    leave()
    await app.loadGraphData(graph, true, true, person.name)
  })
  const rename = Object.assign(make("button", "", say("Rename")), { ariaLabel: say("Rename {}", nameOf(person)) })
  rename.addEventListener("click", () => renamePerson(person, root, leave))
  const consent = Object.assign(make("button", "", say("Consent")), { ariaLabel: say("Consent of {}", nameOf(person)) })
  consent.addEventListener("click", () => writeConsent(person, root, leave))
  const remove = Object.assign(make("button", "", say("Delete")), { ariaLabel: say("Delete {}", nameOf(person)) })
  remove.disabled = rename.disabled = consent.disabled = ["running", "drawing"].includes(person.phase)
  remove.addEventListener("click", () => deletePerson(person, root, leave))
  return make("div", "facelora-person", picture, facts, make("div", "facelora-row", open, rename, consent, remove))
}

async function renamePerson(person, root, leave) {
  const field = Object.assign(make("input", ""), { value: nameOf(person), autofocus: true })
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return
    event.preventDefault() // it would also press the button that gets the focus back
    field.closest("dialog").querySelector(".facelora-end button:last-child").click()
  })
  const wrong = make("div", "facelora-refused")
  field.addEventListener("input", async () => {
    const asked = field.value, { wrong_name = "" } = await read(`/facelora/recipe?${new URLSearchParams({ lora: asked })}`)
    if (asked === field.value) wrong.textContent = saySentence(wrong_name)
  })
  if ((await choose(say("Rename {}", nameOf(person)), [{ title: "", images: [field, wrong] }], say("Rename"))) === undefined) return
  const { error, name } = await change(`/facelora/people/${person.key}`, { name: field.value })
  if (name) document.dispatchEvent(new CustomEvent(RENAMED, { detail: { key: person.key, name } }))
  await listPeople(root, leave)
  if (error) root.prepend(make("div", "facelora-refused", saySentence(error)))
}

/** Shows the note of consent of a training run, and writes what the user changes. */
async function writeConsent(person, root, leave) {
  const address = `/facelora/people/${person.key}/consent`, before = await read(address)
  const fields = Object.keys(CONSENT).map((name, number) =>
    Object.assign(make("input", ""), { name, value: before[name] ?? "", type: number < 2 ? "text" : "date", maxLength: 1000 }))
  const rows = fields.map((field) => ({ title: "", images: [make("label", "facelora-field", say(CONSENT[field.name]), field)] }))
  const title = say("Consent of {}", nameOf(person))
  if (!before.error && (await choose(title, rows, say("Save"))) === undefined) return
  const changed = fields.filter(({ name, value }) => value !== before[name]).map(({ name, value }) => [name, value])
  const { error } = before.error || !changed.length ? before : await change(address, { written: Object.fromEntries(changed) })
  await listPeople(root, leave)
  if (error) root.prepend(make("div", "facelora-refused", saySentence(error)))
}

/** A row of dropped photos that no training run uses. */
function untrained({ name, files }, picture, root, leave) {
  thumbnail(files[0]).then((address) => (picture.src = address))
  const remove = Object.assign(make("button", "", say("Delete")), { ariaLabel: say("Delete {}", name) })
  remove.addEventListener("click", async () => {
    const what = say("This deletes {} photos from ComfyUI's input folder.", files.length)
    if ((await choose(say("Delete {}?", name), [{ title: what, images: [] }], say("Delete"))) === undefined) return
    await deletePhotos(files)
    await listPeople(root, leave)
  })
  const facts = make("div", "facelora-facts", make("b", "", name),
    make("div", "facelora-quiet", say("photos without a LoRA: {}", files.length)))
  return make("div", "facelora-person", picture, facts, remove)
}

async function deletePerson(person, root, leave) {
  const { loras, headshots, photos } = await read(`/facelora/people/${person.key}/files`)
  const what = loras.length
    ? say("This deletes {}, {} headshots, {} dropped photos and cached files. Files that another training run uses are kept.",
      loras.join(", "), headshots, photos)
    : say("No LoRA was made. This deletes {} dropped photos and cached files. Files that another training run uses are kept.", photos)
  if ((await choose(say("Delete {}?", nameOf(person)), [{ title: what, images: [] }], say("Delete"))) === undefined) return
  const { error, deleted = [] } = await read(`/facelora/people/${person.key}`, { method: "DELETE" })
  document.dispatchEvent(new CustomEvent(DELETED, { detail: deleted }))
  await listPeople(root, leave)
  if (error) root.prepend(make("div", "facelora-refused", saySentence(error)))
}

/** Shows the list in a dialog. */
export function showPeople() {
  const list = make("div", "facelora-people")
  const close = make("button", "", say("Close"))
  const dialog = make("dialog", "facelora-dialog facelora-panel", make("h3", "", say("Trained people")), list,
    make("div", "facelora-row facelora-end", close))
  close.addEventListener("click", () => dialog.close())
  openDialog(dialog)
  listPeople(list, () => dialog.close())
}

app.registerExtension({
  name: "facelora.people",
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "facelora", icon: "pi pi-users", title: say("Trained people"), tooltip: say("Trained people"), type: "custom",
      render: (root) => {
        const list = make("div", "facelora-people")
        root.replaceChildren(make("div", "facelora-panel facelora-sidebar", make("h3", "", say("Trained people")), list))
        keepListed(list)
      },
    })
  },
})
