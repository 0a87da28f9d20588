-- Asks for one path again and again: CALL=/v3/requests/ID AUTH="Basic …" wrk -t2 -c32 -d10s -s tests/bench/http/get.lua http://HOST:PORT
request = function()
  return wrk.format("GET", os.getenv("CALL"), {["authorization"]=os.getenv("AUTH")})
end
