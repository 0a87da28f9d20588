// Verifies a callback of Lethe. Needs Go 1.19 or later, and nothing but its standard library.
//
//	go run verify.go CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]
package main

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"
)

// verify returns nil if body (the raw bytes) was signed by domain, and why not otherwise.
//
// certificate is what is at https://<domain>/opendsr_cert.pem, the signing certificate first; at is the
// time to judge it by; roots are the authorities to trust, in PEM, or nil.
func verify(
	certificate []byte, domain string, headers map[string]string, body []byte, at time.Time, roots []byte,
) error {
	header := func(suffix string) string {
		for _, prefix := range []string{"X-OpenDSR-", "X-OpenGDPR-"} {
			for name, value := range headers {
				if value != "" && strings.EqualFold(name, prefix+suffix) {
					return value
				}
			}
		}
		return ""
	}
	sender := header("Processor-Domain")
	if sender == "" {
		return errors.New("processor domain header missing")
	}
	if !strings.EqualFold(sender, domain) {
		return errors.New("processor domain not trusted")
	}
	encoded := header("Signature")
	if encoded == "" {
		return errors.New("signature header missing")
	}
	signature, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return errors.New("signature is not base64")
	}
	key, err := signingKey(certificate, domain, at, roots)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(body)
	if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) != nil {
		return errors.New("signature does not match")
	}
	return nil
}

// signingKey returns the public key in the certificate, once the certificate has been checked.
func signingKey(certificate []byte, domain string, at time.Time, roots []byte) (*rsa.PublicKey, error) {
	chain, err := certificates(certificate)
	if err != nil {
		return nil, err
	}
	anchors := chain[len(chain)-1:]
	if roots != nil {
		if anchors, err = certificates(roots); err != nil {
			return nil, err
		}
	}
	for _, one := range chain {
		if at.Before(one.NotBefore) || at.After(one.NotAfter) {
			return nil, errors.New("certificate expired or not yet valid")
		}
	}
	if !names(chain[0], domain) {
		return nil, errors.New("certificate names another domain")
	}
	options := x509.VerifyOptions{
		Roots:         pool(anchors),
		Intermediates: pool(chain[1:]),
		CurrentTime:   at,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	if _, err := chain[0].Verify(options); err != nil {
		return nil, errors.New("certificate chain not trusted")
	}
	key, ok := chain[0].PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("certificate key is not RSA")
	}
	return key, nil
}

// names tells whether the common name or a DNS name is domain, or a wildcard for its first label.
func names(certificate *x509.Certificate, domain string) bool {
	_, parent, _ := strings.Cut(domain, ".")
	for _, name := range append([]string{certificate.Subject.CommonName}, certificate.DNSNames...) {
		if strings.EqualFold(name, domain) || strings.EqualFold(name, "*."+parent) {
			return true
		}
	}
	return false
}

func certificates(text []byte) (found []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.New("certificate cannot be read")
		}
		found = append(found, certificate)
	}
	if len(found) == 0 {
		return nil, errors.New("certificate cannot be read")
	}
	return found, nil
}

func pool(certificates []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, certificate := range certificates {
		pool.AddCert(certificate)
	}
	return pool
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("valid")
}

func run(arguments []string) error {
	if len(arguments) < 4 {
		return errors.New("usage: verify CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]")
	}
	flags := flag.NewFlagSet("verify", flag.ExitOnError)
	atText := flags.String("at", time.Now().Format(time.RFC3339), "RFC 3339")
	rootsFile := flags.String("roots", "", "PEM file")
	// The flag package stops at the first argument that is none; here they come last.
	if err := flags.Parse(arguments[4:]); err != nil {
		return err
	}
	at, err := time.Parse(time.RFC3339, *atText)
	if err != nil {
		return err
	}
	var roots []byte
	if *rootsFile != "" {
		if roots, err = os.ReadFile(*rootsFile); err != nil {
			return err
		}
	}
	certificate, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	text, err := os.ReadFile(arguments[2])
	if err != nil {
		return err
	}
	var headers map[string]string
	if err := json.Unmarshal(text, &headers); err != nil {
		return err
	}
	body, err := os.ReadFile(arguments[3])
	if err != nil {
		return err
	}
	return verify(certificate, arguments[1], headers, body, at, roots)
}
