// Swagger UI over this server's own description. Without a validatorUrl it sends that nowhere to be judged.
"use strict";

window.SwaggerUIBundle({
  dom_id: "#description",
  url: "openapi.json",
  deepLinking: true,
  docExpansion: "list",
  validatorUrl: null,
});
