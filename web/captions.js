/** The captions of photos, folded below them: to be read, edited and saved beside each photo, as Kohya's tools have them. */

import { api } from "../../scripts/api.js"
import { widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { thumbnail } from "./thumbnails.js"
import { say } from "./words.js"

export class Captions {
  /** `saved` is called after a change. */
  constructor(saved) {
    this.saved = saved
    this.all = {} // by the photos' names in the input folder
    this.rows = make("div", "facelora-captions")
    this.root = make("details", "", make("summary", "", say("Captions")), this.rows)
    this.root.addEventListener("toggle", () => this.draw())
  }

  /** Shows the captions of photos, by their names, for a Train Face LoRA. Without one, they have no use. */
  show(names, train) {
    this.names = names
    this.train = train
    this.root.hidden = !train || !names.length
    this.draw()
  }

  draw() {
    if (!this.root.open || this.root.hidden || this.rows.contains(document.activeElement)) return
    const [trigger, kind] = ["trigger_word", "class_word"].map((name) => widgetOf(this.train, name).value.trim())
    const learnt = make("div", "facelora-quiet", say("{} is learnt as this person. Whatever else a caption names, such as clothes, is not.", trigger))
    this.rows.replaceChildren(learnt, ...this.names.map((name) => this.row(name, trigger, `a photo of ${trigger} ${kind}`.trim())))
  }

  row(name, trigger, usual) {
    const image = Object.assign(make("img", ""), { alt: "" })
    thumbnail(name).then((address) => (image.src = address))
    const field = Object.assign(make("input", ""), { value: this.all[name] ?? "", placeholder: usual, ariaLabel: say("Caption") })
    const note = make("div", "facelora-line facelora-warning")
    const judge = () => {
      const has = new RegExp(`(?<!\\p{L})${RegExp.escape?.(trigger) ?? trigger.replace(/\W/g, "\\$&")}(?!\\p{L})`, "iu")
      note.textContent = !field.value.trim() || has.test(field.value) ? "" : say("The trigger word {} is missing", trigger)
    }
    field.addEventListener("change", async () => {
      const headers = { "Content-Type": "application/json" }, body = JSON.stringify({ name, caption: field.value })
      const { error, caption = "" } = await (await api.fetchApi("/facelora/caption", { method: "PUT", headers, body })).json()
      if (error) return (note.textContent = error)
      this.all[name] = field.value = caption
      judge()
      this.saved()
    })
    judge()
    return make("div", "facelora-caption", image, make("div", "facelora-facts", field, note))
  }
}
