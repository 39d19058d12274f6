"""What mkdocs runs while it builds the site: parts of pages that come from the code, so that they cannot drift."""
