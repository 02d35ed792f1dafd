/** Elements that pages of every interface are made of. Nothing here needs ComfyUI. */

import { say } from "./words.js"

export function make(name, className, ...children) {
  const made = document.createElement(name)
  made.className = className
  made.append(...children)
  return made
}

/** Shows an element in the middle of the page until the next click or key. */
export function showLarge(element) {
  const dialog = make("dialog", "facelora-large", element)
  dialog.addEventListener("click", () => dialog.close())
  dialog.addEventListener("keydown", () => dialog.close())
  openDialog(dialog)
}

/** Lets a click, Enter or the space bar show a copy of the picture large. `large` may add to the copy. */
export function enlargeable(image, large = (copy) => copy) {
  Object.assign(image, { tabIndex: 0, role: "button" })
  image.addEventListener("click", () => {
    const copy = image.cloneNode()
    for (const name of ["tabindex", "role"]) copy.removeAttribute(name)
    showLarge(large(copy))
  })
  image.addEventListener("keydown", (event) => {
    if (event.repeat || !["Enter", " "].includes(event.key)) return
    event.preventDefault() // the space bar would scroll the page
    image.click()
  })
  return image
}

/** Opens a dialog until it is closed, or Escape is pressed, a key that ComfyUI keeps from the browser. */
export function openDialog(dialog) {
  // On the page, because the focused element may be gone. The dialogs below the last one hear the key first, and stay.
  const escape = (event) => {
    if (event.key !== "Escape" || [...document.querySelectorAll("dialog[open]")].at(-1) !== dialog) return
    event.preventDefault() // in a field the browser hears the key too, and would close the dialog below
    dialog.close()
  }
  document.addEventListener("keydown", escape)
  dialog.addEventListener("close", () => {
    document.removeEventListener("keydown", escape)
    dialog.remove()
  })
  document.body.append(dialog)
  dialog.showModal()
}

/**
 * Asks in a dialog with a row of pictures for each {title, images, button, answer}. Resolves to the answer of the chosen row,
 * to null for the button below, and to undefined if the user cancels.
 */
export function choose(question, rows, button) {
  return new Promise((done) => {
    const dialog = make("dialog", "facelora-dialog facelora-panel", make("h3", "", question))
    const answering = (text, answer) => {
      const made = make("button", "", text)
      made.addEventListener("click", () => {
        done(answer)
        dialog.close()
      })
      return made
    }
    for (const row of rows) {
      const head = make("div", "facelora-row", make(row.images.length ? "b" : "span", "", row.title), ...(row.button ? [answering(row.button, row.answer)] : []))
      dialog.append(head, make("div", "facelora-row", ...row.images))
    }
    const cancel = answering(say("Cancel"))
    cancel.autofocus = true
    dialog.append(make("div", "facelora-row facelora-end", cancel, answering(button, null)))
    dialog.addEventListener("close", () => done(undefined))
    openDialog(dialog)
  })
}
