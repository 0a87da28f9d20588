// Verifies a callback of Lethe. Needs Node 18 or later, and nothing but its standard library.
//
//     node verify.mjs CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]

import { X509Certificate, constants, verify as verifySignature } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

/** The callback must not be believed; the message says why. */
export class Refused extends Error {}

/**
 * Returns if `body` (a Buffer of the raw bytes) was signed by `domain`, throws Refused if not.
 *
 * `certificate`: what is at https://<domain>/opendsr_cert.pem, the signing certificate first.
 * `at`: the time to judge the certificate by, if not now. `roots`: PEM of the authorities to trust.
 */
export function verify(certificate, domain, headers, body, { at = new Date(), roots } = {}) {
  headers = Object.fromEntries(Object.entries(headers).map(([name, value]) => [name.toLowerCase(), value]));
  const sender = headers["x-opendsr-processor-domain"] || headers["x-opengdpr-processor-domain"];
  const base64 = headers["x-opendsr-signature"] || headers["x-opengdpr-signature"];
  if (!sender) throw new Refused("processor domain header missing");
  if (sender.toLowerCase() !== domain.toLowerCase()) throw new Refused("processor domain not trusted");
  if (!base64) throw new Refused("signature header missing");
  const signature = Buffer.from(base64, "base64");
  // Buffer skips what is not base64 without a word.
  if (signature.toString("base64") !== base64) throw new Refused("signature is not base64");
  const key = signingKey(certificate, domain, at, roots);
  if (!verifySignature("sha256", body, { key, padding: constants.RSA_PKCS1_PADDING }, signature)) {
    throw new Refused("signature does not match");
  }
}

/** The public key in the certificate, once the certificate has been checked. */
function signingKey(certificate, domain, at, roots) {
  const chain = certificates(certificate);
  const anchors = roots ? certificates(roots) : chain.slice(-1);
  if (!chain.every((one) => new Date(one.validFrom) <= at && at <= new Date(one.validTo))) {
    throw new Refused("certificate expired or not yet valid");
  }
  // "always": the common name counts even where there are alternative names.
  if (!chain[0].checkHost(domain, { subject: "always", partialWildcards: false })) {
    throw new Refused("certificate names another domain");
  }
  if (!trusted(chain, anchors)) throw new Refused("certificate chain not trusted");
  // Node would verify with whatever kind of key there is.
  if (chain[0].publicKey.asymmetricKeyType !== "rsa") throw new Refused("certificate key is not RSA");
  return chain[0].publicKey;
}

function certificates(pem) {
  try {
    const blocks = pem.toString().match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g);
    return blocks.map((block) => new X509Certificate(block));
  } catch {
    throw new Refused("certificate cannot be read");
  }
}

/** Whether each certificate was issued by the next one, up to an anchor. */
function trusted(chain, anchors) {
  for (const [index, certificate] of chain.entries()) {
    const anchored = (anchor) => certificate.raw.equals(anchor.raw) || issued(certificate, anchor);
    if (anchors.some(anchored)) return true;
    if (index + 1 === chain.length || !issued(certificate, chain[index + 1])) return false;
  }
  return false;
}

/** Whether `issuer` is an authority and signed `certificate`. */
function issued(certificate, issuer) {
  return issuer.ca && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
}

function main() {
  const options = { at: { type: "string" }, roots: { type: "string" } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [certificate, domain, headers, body] = positionals;
  const at = values.at ? new Date(values.at) : undefined;
  const roots = values.roots ? readFileSync(values.roots) : undefined;
  const fields = JSON.parse(readFileSync(headers, "utf8"));
  try {
    verify(readFileSync(certificate), domain, fields, readFileSync(body), { at, roots });
  } catch (error) {
    console.error(error instanceof Refused ? error.message : error);
    process.exit(1);
  }
  console.log("valid");
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) main();
