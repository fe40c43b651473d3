/** The widget of a notebook: a kernel answers, but for the first prompt's map and texts, which the notebook keeps. */
function render({ model, el }) {
  const presets = model.get("presets"), waiting = new Map();
  let count = 0;
  const heard = (message, buffers) => {
    const { done, refuse } = waiting.get(message.id) ?? {};
    waiting.delete(message.id);
    if (buffers.length) done?.(buffers[0]);
    else refuse?.(new Error(message.error));
  };
  model.on("msg:custom", heard);
  const ask = (question, tell) => {
    const timer = setTimeout(() => tell("Waiting for the kernel: run this cell if none runs. The first example works without one."), 5000);
    return new Promise((done, refuse) => {
      if (question.ask === "texts" && question.prompt === presets[0][1]) {
        if (model.get("texts").byteLength) return done(model.get("texts"));
        model.on("change:texts", () => done(model.get("texts")));
      }
      waiting.set(++count, { done, refuse });
      model.send({ id: count, question });
    }).finally(() => clearTimeout(timer));
  };
  const close = mount(el, { presets, blocks: presets.map((_, i) => i ? null : model.get("block")), ask });
  return () => {
    model.off("msg:custom", heard);
    close();
  };
}

export default { render };
