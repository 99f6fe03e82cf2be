"""Pages, a file each, by who gives them: the core, or an experiment. Each draws; what it asks stands in `app.queries`."""
