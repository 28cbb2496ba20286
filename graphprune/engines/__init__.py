"""The engines: each module here wraps one inference engine behind `graphprune.engines.base.Engine`."""
