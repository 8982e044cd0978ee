"""An engine over HTTP: images as OpenAI's API has them, jobs, a page to try it."""
