/** The texts of the widgets, in English or in the user's language if it is here. */

/** Chinese for these texts, for what the check of photos says ({} stands for any text), and for the names of options and styles. */
const ZH = await (await fetch(new URL("./zh.json", import.meta.url), { cache: "no-cache" })).json()

export const inChinese = (text) => ZH.texts[text]
let isChinese = () => false
/** Sets the function that returns whether the user's language is Chinese. */
export const speakChinese = (when) => (isChinese = when)
const filled = (text, values) => text.replaceAll("{}", () => values.shift())

/** The text in the user's language. The values replace its {}, in their order. */
export const say = (text, ...values) => filled((isChinese() && ZH.texts[text]) || text, values)

/** The name of an option or a style in the user's language. */
export const sayName = (name) => (isChinese() && ZH.names[name]) || name

/** What the check of photos says, in the user's language. */
export function saySentence(sentence) {
  if (!isChinese() || !sentence) return sentence
  const patterns = Object.entries(ZH.sentences).map(([text, chinese]) =>
    [new RegExp(`^${text.replace(/[.()]/g, "\\$&").replaceAll("{}", "(.+)")}$`), chinese])
  const part = (text) => {
    const [pattern, chinese] = patterns.find(([one]) => one.test(text)) ?? []
    return pattern ? filled(chinese, pattern.exec(text).slice(1).map(part)) : text
  }
  return sentence.split("; ").map(part).join("；")
}
