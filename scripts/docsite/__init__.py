"The documentation site: nbdev's processing, API documentation, plain pages, and what is checked on them."
