"""One self-contained HTML page from stored results; `page.report` writes it."""
