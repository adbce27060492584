"""Captions from a large model behind an OpenAI-compatible endpoint: paid once, never lost, never made up."""

# The default. A caption is what Stage 2 learns to write: facts, in whole sentences, with an end.
PROMPT = (
    "Describe this image in one paragraph of 60 to 150 words. Name the objects and people, how many there are, "
    "their colours, what they do and where in the picture they are; then the background, any text that can be read, "
    "the light, and whether it is a photograph, a drawing or something else. Say only what can be seen. Begin "
    "with the description itself, without an introduction."
)
